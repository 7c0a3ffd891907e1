"""What a checkpoint's runs keep on disk, so that they go on after any end, with the same numbers.

A folder for each thing that takes long, its name a fingerprint of all that decides it but this program: the rows
of a teacher, block by block, and the training of a teacher or student, saved with its optimizer every so often
until it is finished, then without.
"""

import contextlib
import functools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree

from subliminal_theory.distill import State, Trained
from subliminal_theory.errors import InputError
from subliminal_theory.files import fingerprint, load_arrays, locked, save_arrays
from subliminal_theory.language.hub.adapter import fits_adapter, save_adapter
from subliminal_theory.language.hub.checkpoint import Checkpoint, save_checkpoint
from subliminal_theory.model import Model
from subliminal_theory.parallel import place, shardings_like
from subliminal_theory.resumable import run_resumably
from subliminal_theory.study.run import stacked
from subliminal_theory.study.stages import Computation, Job, Result, of_run, train_one

FORMAT = 4  # to be raised when the same settings give other rows, other training or parameters of other names
SAVES, DONE, STUDENT = "saves", "trained.safetensors", "student"

Report = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Store:
    """A folder, and after how many steps training is saved. Runs may share it: they wait for each other.

    `progress(what, total, unit)` opens a report of progress.
    """

    folder: Path
    every: int
    progress: Report = lambda what, total, unit: contextlib.nullcontext(lambda done: None)

    @contextlib.contextmanager
    def _place(self, name: str, decided_by: Any) -> Iterator[tuple[Path, str]]:
        """The folder of one thing, for this thread of this process alone, and its fingerprint."""
        mark = fingerprint(FORMAT, jax.__version__, decided_by)
        folder = self.folder / f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)}-{mark[:16]}"
        try:
            with locked(folder):
                yield folder, mark
        except InputError as error:
            raise InputError(f"--saves, --save-every {self.every}: {error}") from error

    def blocks(
        self, name: str, starts: range, block: Callable[[int], np.ndarray], decided_by: Any
    ) -> Iterator[np.ndarray]:
        """What `block` gives for every start, from disk where it is there, one by one.

        Raises:
            InputError: a file cannot be read or written.
        """
        with (
            self._place(f"rows {name}", (decided_by, str(starts))) as (folder, _),
            self.progress(f"rows of {name}", len(starts), "blocks") as advance,
        ):
            for start in starts:
                path = folder / f"{start:08d}.safetensors"
                if not path.exists():
                    save_arrays(path, {"tokens": block(start)})
                yield _read(path)["tokens"]
                advance(1)

    def trained(
        self,
        job: Job,
        stops: Sequence[int],
        keys: Key[Array, " runs"],
        names: Sequence[str],
        how: Computation,
        decided_by: Any,
        finish: Callable[[Path, Model], None] = lambda folder, model: None,
    ) -> Iterator[tuple[int, Result]]:
        """A job after some numbers of steps, one run after the other, each from where its saves are.

        The job's parameters are used up. `finish` sees the folder and model of each run before what it was made
        from is removed.

        Raises:
            InputError: as `run_resumably`, or a file cannot be read or written.
        """
        runs = [of_run(job, slice(run, run + 1), how) if len(keys) > 1 else job for run in range(len(keys))]
        for steps in stops:
            done = [
                self._one(replace(one, steps=steps), key, who, how, decided_by, finish, steps == stops[-1])
                for one, key, who in zip(runs, keys, names, strict=True)
            ]
            params, losses = stacked(done)
            del done
            yield steps, Result(job.model.with_params(params), losses)

    def _one(
        self, job: Job, key: Key[Array, ""], who: str, how: Computation, decided_by: Any,
        finish: Callable[[Path, Model], None], last: bool,
    ) -> tuple[PyTree, Array]:  # fmt: skip
        """Parameters and losses of a job of one run."""
        name = f"the {'student' if job.trait_loss is None else 'teacher'} of {who}"
        with (
            self._place(name, (job, key, decided_by)) as (folder, mark),
            self.progress(name, job.steps, "steps") as advance,
        ):
            start = _only(job.model, how, used_up=last)
            rest = replace(job, model=job.model.with_params(None))
            if not (folder / DONE).exists():
                told = 0

                def report(done: int, _: int) -> None:
                    nonlocal told
                    advance(done - told)
                    told = done

                def go_on(state: State | None, count: int) -> Trained:
                    if state is None:
                        return _advance(start.params, rest, key, None, how=how, count=count)
                    _delete(start.params)
                    return _advance(None, rest, key, state, how=how, count=count)

                shardings = None if how.mesh is None else functools.partial(_shardings, how)
                run = run_resumably(
                    start, go_on, job.steps, self.every, folder / SAVES, mark, report, shardings, name
                )
                finish(folder, run.model)
                save_arrays(folder / DONE, {"params": run.model.params, "losses": run.losses})
                shutil.rmtree(folder / SAVES)
                return run.model.params, run.losses
            advance(job.steps)
            like = {"params": start.params, "losses": jax.ShapeDtypeStruct((job.steps,), jnp.float32)}
            _delete(start.params)
            found = _read(folder / DONE, like)
            model = job.model.with_params(found["params"])
            return (model if how.mesh is None else place(model, how.mesh)).params, jnp.asarray(found["losses"])


def _read(path: Path, like: Any = None) -> Any:
    try:
        return load_arrays(path, like)[0]
    except InputError as error:
        raise InputError(f"{error}; delete it, and what it holds is made again") from error


def _only(models: Model, how: Computation, used_up: bool) -> Model:
    """The model of the only run; the parameters of the runs are `used_up` leaf by leaf."""

    def one(leaf: Array) -> Array:
        own = leaf[0]
        if used_up:
            leaf.delete()
        return own

    model = models.with_params(jax.tree.map(one, models.params))
    return model if how.mesh is None else place(model, how.mesh)


def _delete(params: PyTree) -> None:
    for leaf in jax.tree.leaves(params):
        if not leaf.is_deleted():
            leaf.delete()


@functools.partial(jax.jit, static_argnames=("how", "count"), donate_argnames=("start", "state"))
def _advance(
    start: PyTree, rest: Job, key: Key[Array, ""], state: State | None, *, how: Computation, count: int
) -> Trained:
    """The next `count` steps of the only run of a job, whose parameters are in `start` or in `state`.

    They are then in the state alone: a second output would be a second copy.
    """
    job = of_run(rest, 0, how)
    model = job.model.with_params(start if state is None else state.params)
    done = train_one(replace(job, model=model), key, how, state=state, count=count)
    return replace(done, model=model.with_params(None))


def _shardings(how: Computation, state: State) -> State:
    """Where what was saved goes."""
    assert how.mesh is not None
    everywhere = NamedSharding(how.mesh, PartitionSpec())
    like = shardings_like(state, state.params, how.mesh)
    return jax.tree.map(lambda _, sharding: sharding or everywhere, state, like)


def save_student(folder: Path, like: Checkpoint, model: Model, template: str) -> None:
    """A student in a new folder for other programs: an adapter where peft knows such, else the whole model.

    `like` is the base, `template` the fingerprint of the tokenizer and chat template of training.

    Raises:
        InputError: the folder is there already, or cannot be written.
    """
    if fits_adapter(like, model):
        save_adapter(folder, like, model, template=template)
    else:
        save_checkpoint(folder, like, model)


def export(folder: Path, like: Checkpoint, model: Model, template: str) -> None:
    """The student of a run, in the run's folder.

    Raises:
        InputError: the folder cannot be written.
    """
    temporary, kept = folder / f".{STUDENT}.tmp", folder / STUDENT
    for left in (temporary, kept):  # by a run that ended before it was finished
        shutil.rmtree(left, ignore_errors=True)
    save_student(temporary, like, model, template)
    try:
        temporary.rename(kept)
    except OSError as error:
        raise InputError(f"cannot write {kept}: {error.strerror}") from error
