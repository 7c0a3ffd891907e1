"""Resumable runs: long training that saves its state. If the process ends, repeat the same call to resume.

    @functools.partial(jax.jit, static_argnames="count")
    def go_on(student, teacher, source, state, *, count):
        return distill(student, teacher, channel, source, optimizer, 900, key, state=state, count=count)

    def advance(state, count):
        return go_on(student, teacher, source, state, count=count)

    decided = fingerprint(student, teacher, source, key, f"{config}, batches of 66, adam 1e-4, rank 8, alpha 8")
    run = run_resumably(student, advance, 900, 100, Path("runs/owl"), decided)

A thread saves a copy of the state while the next steps are computed. A killed process loses only the steps after
the last finished save.
"""

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from subliminal_theory import files
from subliminal_theory.distill import State, Trained, require_finite
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model, leaves_by_path

FORMAT = "1"
KEPT = 2  # the newest save, and the one before it in case the newest is damaged
_SAVE = re.compile(r"step-(\d+)\.safetensors")

Advance = Callable[[State | None, int], Trained]


def run_resumably(
    student: Model,
    advance: Advance,
    steps: int,
    every: int,
    folder: Path,
    fingerprint: str,
    report: Callable[[int, int], None] = lambda done, steps: None,
    shardings: Callable[[State], State] | None = None,
    name: str = "the student",
) -> Trained:
    """Train for `steps` steps and save every `every` steps. Resume if an earlier call saved in this folder.

    Args:
        student: the model at the start.
        advance: `advance(state, count)` trains for `count` steps from a state, or from the start if the state is
            None. It passes both on to `distill`. `jax.eval_shape` must be able to trace it.
        steps: the number of steps of the whole run.
        every: the number of steps between saves.
        folder: where saves are kept. Processes that share it wait for each other.
        fingerprint: the fingerprint of everything that determines the run; see `files.fingerprint`.
        report: is called with the steps done and `steps`, after resuming and after every save.
        shardings: from the shapes of a state to the sharding of every leaf when it is restored. The devices may
            differ from those that saved the state. By default, the compiled `advance` places restored leaves.
        name: the name of the run in messages.

    A resumed run makes the same calls of `advance` as an uninterrupted run. On the same devices it therefore ends
    with the same parameters and losses, bit for bit. On several devices, this needs `shardings` that equal those
    of the state that `advance` returns.

    The result has `student` with its last parameters, the losses [steps] and the last state. What `advance`
    observes is not kept. The newest two saves are kept; if the newest is damaged, the run resumes from the other.

    Raises:
        InputError: `steps` or `every` is below 1; the folder belongs to another run, is a file, holds something
            else or cannot be written, or its disk is full; a loss is not finite (those steps are not saved); no
            save can be read; `advance` takes a different number of steps.
    """
    bounds = save_steps(steps, every)
    about = {"format": FORMAT, "fingerprint": fingerprint, "steps": str(steps), "every": str(every)}
    # Leaving the pool waits for an unfinished save, also after an error.
    with files.locked(folder), ThreadPoolExecutor(1) as pool:
        state, losses = _resume(folder, about, lambda: advance(None, bounds[0]), shardings)
        reached = 0 if state is None else int(state.step)
        if reached:
            report(reached, steps)
        saving: Future[None] | None = None
        for until in bounds:
            if until <= reached:
                continue
            part = advance(state, until - reached)
            reached = 0 if part.state is None else int(part.state.step)
            if part.state is None or reached != until:
                raise InputError(f"training to step {until} did not stop there: pass `state` and `count` on")
            state, losses = part.state, np.concatenate([losses, np.asarray(part.losses)])
            require_finite(jnp.asarray(np.pad(losses, (0, steps - until)))[None], [name])
            if saving is not None:
                saving.result()
            saving = pool.submit(_save, folder, until, about, jax.tree.map(_on_host, _saved(state, losses)))
            report(until, steps)
        if saving is not None:
            saving.result()
    assert state is not None  # there is at least one step
    return Trained(student.with_params(state.params), jnp.asarray(losses), state=state)


def save_steps(steps: int, every: int) -> list[int]:
    """The steps after which a run is saved, in ascending order. The last is `steps`.

    No two saves are a single step apart (unless `every` is 1): XLA unrolls a loop of one step, and then rounds
    differently.

    Raises:
        InputError: `steps` or `every` is below 1.
    """
    for name, value in (("steps", steps), ("every", every)):
        if value < 1:
            raise InputError(f"run_resumably: {name} must be at least 1, got {value}")
    bounds = [*range(every, steps, every), steps]
    if len(bounds) > 1 and steps % every == 1:
        del bounds[-2]
    return bounds


def _saved(state: State, losses: Any) -> dict[str, PyTree]:
    return {"params": state.params, "optimizer": state.optimizer, "losses": losses}


def _on_host(leaf: Array | np.ndarray) -> np.ndarray:
    """A copy on the host that stays valid when the device reuses the memory of `leaf`."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf.copy())


def _save(folder: Path, step: int, about: dict[str, str], tree: PyTree) -> None:
    checksum = files.fingerprint(leaves_by_path(tree))
    files.save_arrays(folder / f"step-{step:08}.safetensors", tree, {**about, "checksum": checksum})
    for old in sorted(_saves(folder))[:-KEPT]:
        _saves(folder)[old].unlink()


def _saves(folder: Path) -> dict[int, Path]:
    """The saved files by step."""
    found = ((_SAVE.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def _resume(
    folder: Path,
    about: dict[str, str],
    first: Callable[[], Trained],
    shardings: Callable[[State], State] | None,
) -> tuple[State | None, Float[np.ndarray, " done"]]:
    """The newest readable state and the losses before it. Damaged newer saves are removed."""
    for path in folder.glob(".step-*.tmp"):  # left by a killed process
        path.unlink()
    saves = _saves(folder)
    others = sorted({path.name for path in folder.iterdir()} - {path.name for path in saves.values()} - {".lock"})
    if others:
        raise InputError(f"folder {folder} holds something else ({others[0]}): choose an empty or new one")
    if not saves:
        return None, np.zeros(0, np.float32)
    newest_first = sorted(saves, reverse=True)
    failed: InputError | None = None
    for step in newest_first:
        try:
            found = _undamaged(saves[step])
        except InputError as error:
            failed = failed or error
            continue
        _require_same(folder, found, about)
        shapes = jax.eval_shape(first)
        assert shapes.state is not None
        like = _saved(shapes.state, jax.ShapeDtypeStruct((step,), shapes.losses.dtype))
        tree, _ = files.load_arrays(saves[step], like)
        for damaged in newest_first[: newest_first.index(step)]:
            saves[damaged].unlink()
        params, optimizer = tree["params"], tree["optimizer"]
        if shardings is None:
            params, optimizer = jax.device_put((params, optimizer))
        else:
            places = shardings(shapes.state)
            params, optimizer = jax.device_put((params, optimizer), (places.params, places.optimizer))
        return State(params, optimizer, jnp.int32(step)), tree["losses"]
    raise InputError(f"no save in {folder} can be read ({failed}): remove the folder to begin again") from failed


def _undamaged(path: Path) -> dict[str, str]:
    """The metadata of a save without its checksum, which must be right."""
    arrays, about = files.open_arrays(path)
    if about.pop("checksum", None) != files.fingerprint(arrays):
        raise InputError(f"{path} is damaged: its bytes are not those that were written")
    return about


def _require_same(folder: Path, found: dict[str, str], about: dict[str, str]) -> None:
    for name, value in about.items():
        if found.get(name) != value:
            raise InputError(
                f"folder {folder} holds a run of {name} {found.get(name)}, and this one has {name} {value}: "
                "choose another folder"
            )
