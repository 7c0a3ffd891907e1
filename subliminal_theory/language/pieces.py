"""A long run in pieces, saved after each: whatever ends the process, the same call goes on from the last save.

    @functools.partial(jax.jit, static_argnames="count")
    def go_on(student, teacher, source, state, *, count):
        return distill(student, teacher, channel, source, optimizer, 900, key, state=state, count=count)

    def piece(state, count):
        return go_on(student, teacher, source, state, count=count)

    mark = mark_of(student, teacher, source, key, f"{config}, batches of 66, adam 1e-4, rank 8, alpha 8")
    run = run_in_pieces(student, piece, 900, 100, Path("runs/owl"), mark)

State is saved in the background, with Orbax, under a temporary name that the finished checkpoint loses: a
checkpoint that has its name is whole. A kill costs the steps of the piece it hits, and of the piece before where
that was still being saved.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Float
from orbax.checkpoint.checkpoint_managers import LatestN

from subliminal_theory.distill import State, Trained, require_finite
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model

RECORD, CHECKPOINTS, FORMAT = "pieces.json", "checkpoints", 1
KEPT = 2  # the newest, and the one before it in case the disk damages the newest

Piece = Callable[[State | None, int], Trained]


def run_in_pieces(
    student: Model,
    piece: Piece,
    steps: int,
    every: int,
    folder: Path,
    mark: str,
    report: Callable[[int, int], None] = lambda done, steps: None,
    shardings: Callable[[State], State] | None = None,
    name: str = "the student",
) -> Trained:
    """Make a run of `steps`, `every` steps at a time, and go on where an earlier call with this folder ended.

    `piece(state, count)` goes on from a state, or begins where that is None, for `count` steps: `distill` with
    its arguments of these names. It must be one that `jax.eval_shape` can trace, and the same in every call:
    `mark` is a hash of all that decides the run (`mark_of` configuration, base and data). A resumed run has the
    same pieces, so the same programs, and ends with the same parameters and losses bit for bit on the same
    devices. `report` gets the steps done and `steps`: where a run is resumed, and after each piece.

    `shardings` gives, for the shapes of a state, the sharding of every leaf on which to restore it; the devices
    need not be those that saved it. Without it a restored state belongs to no device and goes where the program
    of `piece` puts it: on one device that is the same, but on several the bits are only the same where
    `shardings` are those of the states that `piece` returns.

    The result is `student` at its last parameters, the losses [steps] of all pieces and the last state; what
    pieces observe is not kept. The folder holds the newest two checkpoints, and only older and damaged ones are
    removed: where the newest is damaged, the run goes on from the one before. One process at a time. `name` is
    what messages call the run.

    Raises:
        InputError: steps or every are below 1; the folder is of another mark, steps or every, is a file, holds
            something else or cannot be written, or its disk is full; a loss is not finite, in which case its piece
            is not saved; no checkpoint can be read; `piece` makes another number of steps.
    """
    bounds = piece_bounds(steps, every)
    _claim(folder, {"format": FORMAT, "mark": mark, "steps": steps, "every": every})
    options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(KEPT), cleanup_tmp_directories=True)
    # Leaving the manager waits for a save under way, also when a piece fails.
    with ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options) as manager:
        state, losses = _resume(manager, folder, lambda: piece(None, bounds[0]), shardings)
        reached = 0 if state is None else int(state.step)
        if reached:
            report(reached, steps)
        for until in bounds:
            if until <= reached:
                continue
            part = piece(state, until - reached)
            reached = 0 if part.state is None else int(part.state.step)
            if part.state is None or reached != until:
                raise InputError(f"the piece up to step {until} did not stop there: pass it `state` and `count`")
            state, losses = part.state, [*losses, np.asarray(part.losses)]
            done = np.concatenate(losses)
            require_finite(jnp.asarray(np.pad(done, (0, steps - until)))[None], [name])
            with _saving(folder):
                manager.save(until, args=ocp.args.StandardSave(_saved(state, done)))
            report(until, steps)
        with _saving(folder):
            manager.wait_until_finished()
    assert state is not None  # there is at least one piece
    return Trained(student.with_params(state.params), jnp.concatenate(losses), state=state)


def mark_of(*given: Any) -> str:
    """SHA-256 of all that decides a run: of arrays in trees by path, format, shape and numbers, else by `repr`.

    One array at a time is on the host. What trees hold as static (a batch size, a channel's temperature, the
    configuration and scale of a model) is not seen, nor is the program: name it beside them.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(given):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array | np.ndarray):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf!r}\n".encode())
            continue
        # JAX keeps the numbers that it fetched from a device as long as the array they are of, here a copy.
        numbers = np.ascontiguousarray(np.asarray(leaf.copy()))
        digest.update(f"{jax.tree_util.keystr(path)} {numbers.dtype} {leaf.shape}\n".encode())
        digest.update(numbers.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def piece_bounds(steps: int, every: int) -> list[int]:
    """The ascending steps at which pieces end, the last of them `steps`.

    A last piece of one step joins the one before: XLA unrolls a loop of one step, and rounds otherwise.

    Raises:
        InputError: steps or every are below 1.
    """
    for name, value in (("steps", steps), ("every", every)):
        if value < 1:
            raise InputError(f"run_in_pieces: {name} must be at least 1, got {value}")
    bounds = [*range(every, steps, every), steps]
    if len(bounds) > 1 and steps % every == 1:
        del bounds[-2]
    return bounds


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Note whose folder it is, or refuse one that is another's or cannot be written."""
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"folder {folder} is a file: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{RECORD}.tmp"
        found = {path.name for path in folder.iterdir()} - {temporary.name}
        if RECORD in found:
            _require_same(folder, record)
        elif found:
            raise InputError(f"folder {folder} holds something else ({min(found)}): choose an empty or new one")
        # Also where it is there already, as this shows whether the folder can be written.
        temporary.write_text(json.dumps(record))
        os.replace(temporary, folder / RECORD)
    except OSError as error:
        raise InputError(f"cannot use folder {folder}: {error.strerror}: choose another folder") from error


def _require_same(folder: Path, record: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / RECORD).read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys() != record.keys():
        raise InputError(f"{folder / RECORD} is damaged or of another version: choose another folder")
    for name, value in record.items():
        if found[name] != value:
            raise InputError(
                f"folder {folder} holds a run of {name} {found[name]}, and this one has {name} {value}: "
                "choose another folder"
            )


def _saved(state: State, losses: Any) -> dict[str, Any]:
    """What a checkpoint holds: leaves only, as their structure is in the program."""
    return {
        "params": jax.tree.leaves(state.params),
        "optimizer": jax.tree.leaves(state.optimizer),
        "losses": losses,
    }


def _resume(
    manager: ocp.CheckpointManager,
    folder: Path,
    first: Callable[[], Trained],
    shardings: Callable[[State], State] | None,
) -> tuple[State | None, list[Float[np.ndarray, " _"]]]:
    """The newest state that can be read and the losses before it; damaged newer checkpoints are removed."""
    found = sorted(manager.all_steps(), reverse=True)
    if not found:
        return None, []
    shapes = jax.eval_shape(first)
    failed: Exception | None = None
    for step in found:
        try:
            state, losses = _restore(manager, step, shapes, shardings)
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            failed = failed or error
            continue
        for damaged in found[: found.index(step)]:
            manager.delete(damaged)  # Orbax would skip, in silence, saving a step that is not the newest
        return state, [losses]
    reason = str(failed).partition("\n")[0]
    raise InputError(
        f"no checkpoint in folder {folder} can be read ({reason}): remove the folder to begin again"
    ) from failed


def _restore(
    manager: ocp.CheckpointManager, step: int, shapes: Trained, shardings: Callable[[State], State] | None
) -> tuple[State, Float[np.ndarray, " done"]]:
    assert shapes.state is not None
    target = shapes.state
    given = [] if shardings is None else [shardings(target)]
    target = jax.tree.map(_shape, target, *given)
    wanted = _saved(target, jax.ShapeDtypeStruct((step,), shapes.losses.dtype))
    wanted = jax.tree.map(_of_no_device, wanted)
    got = manager.restore(step, args=ocp.args.StandardRestore(wanted))
    for asked, leaf in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        if (asked.shape, asked.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{leaf.dtype}{list(leaf.shape)} in the place of {asked.dtype}{list(asked.shape)}")

    def rebuilt(tree: Any, leaves: list[Any]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(leaf) for leaf in leaves])

    params, optimizer = rebuilt(target.params, got["params"]), rebuilt(target.optimizer, got["optimizer"])
    return State(params, optimizer, jnp.int32(step)), got["losses"]


def _shape(leaf: Any, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _of_no_device(leaf: jax.ShapeDtypeStruct) -> Any:
    """An array of NumPy, for which Orbax returns such, unless it is to go to given devices or is a key."""
    if leaf.sharding is not None or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return np.empty(leaf.shape, leaf.dtype)


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TensorStore has its own kinds for a full disk
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"cannot save to folder {folder} ({reason}): make room, then call again to go on"
        ) from error
