"""What the runs of a checkpoint keep on disk, so that an interrupted run resumes with the same numbers.

Each long computation has a folder: the rows of a teacher, block by block, and the training of a teacher or
student. The folder's name ends in a fingerprint of everything that determines the result, except the code itself.
Training saves its optimizer state regularly until it is finished; the finished model is saved without it.
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

FORMAT = 4  # raise it when a change to the code makes equal settings give different rows, training or names
SAVES, DONE, STUDENT = "saves", "trained.safetensors", "student"

# Opens a progress report: what, how many units, and their name.
Report = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], None]]]


def silent(what: str, total: int, unit: str) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """A progress report that shows nothing."""
    return contextlib.nullcontext(lambda done: None)


@dataclass(frozen=True)
class Store:
    """A folder in which training is saved every `every` steps. Runs may share it; they wait for each other."""

    folder: Path
    every: int

    @contextlib.contextmanager
    def _place(self, name: str, decided_by: Any) -> Iterator[tuple[Path, str]]:
        """Lock the folder of one computation for this thread. Give the folder and its fingerprint."""
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
        """The result of `block` for every start, one by one, read from disk if it is stored.

        Raises:
            InputError: a file cannot be read or written.
        """
        with self._place(f"rows {name}", (decided_by, str(starts))) as (folder, _):
            for start in starts:
                path = folder / f"{start:08d}.safetensors"
                if not path.exists():
                    save_arrays(path, {"tokens": block(start)})
                yield _read(path)["tokens"]

    def trained(
        self,
        job: Job,
        stops: Sequence[int],
        keys: Key[Array, " runs"],
        names: Sequence[str],
        how: Computation,
        decided_by: Any,
        finish: Callable[[Path, Model], None] = lambda folder, model: None,
        progress: Report = silent,
    ) -> Iterator[tuple[int, Result]]:
        """Train a job for each number of steps in `stops`, one run after another. Each run resumes from its saves.

        The job's parameters are deleted. `finish` is called with the folder and the model of each run, before the
        saves of the run are removed. `progress` opens a progress report for each run.

        Raises:
            InputError: as for `run_resumably`, or a file cannot be read or written.
        """
        runs = [of_run(job, slice(run, run + 1), how) if len(keys) > 1 else job for run in range(len(keys))]
        for steps in stops:
            done = [
                self._one(
                    replace(one, steps=steps), key, who, how, decided_by, finish, progress, steps == stops[-1]
                )
                for one, key, who in zip(runs, keys, names, strict=True)
            ]
            params, losses = stacked(done)
            del done
            yield steps, Result(job.model.with_params(params), losses)

    def _one(
        self, job: Job, key: Key[Array, ""], who: str, how: Computation, decided_by: Any,
        finish: Callable[[Path, Model], None], progress: Report, last: bool,
    ) -> tuple[PyTree, Array]:  # fmt: skip
        """Parameters and losses of a job of one run."""
        name = what_trains(job, who)
        with (
            self._place(name, (job, key, decided_by)) as (folder, mark),
            progress(name, job.steps, "steps") as advance,
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


def what_trains(job: Job, who: str) -> str:
    """The name of a job of one run."""
    return f"the {'student' if job.trait_loss is None else 'teacher'} of {who}"


def _read(path: Path, like: Any = None) -> Any:
    try:
        return load_arrays(path, like)[0]
    except InputError as error:
        raise InputError(f"{error}; delete it, and its content will be made again") from error


def _only(models: Model, how: Computation, used_up: bool) -> Model:
    """The model of the only run. If `used_up`, the given parameters are deleted leaf by leaf."""

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
    """The next `count` steps of the only run of a job. Its parameters are in `start` or in `state`.

    The result has the parameters only in its state, because a second output would be a second copy.
    """
    job = of_run(rest, 0, how)
    model = job.model.with_params(start if state is None else state.params)
    done = train_one(replace(job, model=model), key, how, state=state, count=count)
    return replace(done, model=model.with_params(None))


def _shardings(how: Computation, state: State) -> State:
    """The sharding of every leaf of a restored state."""
    assert how.mesh is not None
    everywhere = NamedSharding(how.mesh, PartitionSpec())
    like = shardings_like(state, state.params, how.mesh)
    return jax.tree.map(lambda _, sharding: sharding or everywhere, state, like)


def save_student(folder: Path, like: Checkpoint, model: Model, template: str) -> None:
    """Save a student in a new folder for other programs: an adapter if peft supports it, else the whole model.

    `like` is the base; `template` is the fingerprint of the tokenizer and chat template used in training.

    Raises:
        InputError: the folder already exists or cannot be written.
    """
    if fits_adapter(like, model):
        save_adapter(folder, like, model, template=template)
    else:
        save_checkpoint(folder, like, model)


def export(folder: Path, like: Checkpoint, model: Model, template: str) -> None:
    """Save the student of a run in the run's folder. See `save_student` for the arguments.

    Raises:
        InputError: the folder cannot be written.
    """
    temporary, kept = folder / f".{STUDENT}.tmp", folder / STUDENT
    for left in (temporary, kept):  # left by a killed run
        shutil.rmtree(left, ignore_errors=True)
    save_student(temporary, like, model, template)
    try:
        temporary.rename(kept)
    except OSError as error:
        raise InputError(f"cannot write {kept}: {error.strerror}") from error
