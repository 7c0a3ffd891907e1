"""What a checkpoint's runs keep on disk, so that they go on after any end, with the same numbers.

A folder for each thing that takes long, its name a hash of all that decides it but this program: the rows of a
teacher, saved block by block, and the training of a teacher or student, saved every so many steps with its
optimiser until it is finished, then without.
"""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock

from subliminal_theory.distill import State, Trained
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.adapter import fits_adapter, save_adapter
from subliminal_theory.language.hub.checkpoint import Checkpoint, save_checkpoint
from subliminal_theory.language.pieces import mark_of, run_in_pieces
from subliminal_theory.model import Model
from subliminal_theory.runs import write_atomically

from .app.progress import progress

FORMAT = 1  # to be raised when the same settings give other rows or other training
PIECES, DONE, STUDENT = "pieces", "trained.npz", "student"


@dataclass(frozen=True)
class Saves:
    """A folder, and after how many steps training is saved. Runs may share it: they wait for each other."""

    folder: Path
    every: int

    @contextlib.contextmanager
    def place(self, name: str, decided_by: Any) -> Iterator[tuple[Path, str]]:
        """The folder of one thing, for this thread of this process alone, and its mark.

        Raises:
            InputError: the folder cannot be made.
        """
        mark = mark_of(FORMAT, jax.__version__, decided_by)
        folder = self.folder / f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)}-{mark[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock").acquire()
        except OSError as error:
            raise InputError(f"--saves: cannot use the folder {folder}: {error.strerror}") from error
        with lock:
            yield folder, mark

    def blocks(
        self, name: str, starts: range, block: Callable[[int], np.ndarray], decided_by: Any
    ) -> list[np.ndarray]:
        """What `block` gives for every start, from disk where it is there.

        Raises:
            InputError: a file cannot be read or written.
        """
        found = []
        with (
            self.place(f"rows {name}", (decided_by, starts)) as (folder, _),
            progress(f"rows of {name}", len(starts), "blocks") as advance,
        ):
            for start in starts:
                path = folder / f"{start:08d}.npy"
                if path.exists():
                    found.append(_read(path))
                else:
                    found.append(block(start))
                    stream = io.BytesIO()
                    np.save(stream, found[-1])
                    write_atomically(path, stream.getvalue())
                advance(1)
        return found

    def trained(
        self,
        name: str,
        model: Model,
        piece: Callable[[State | None, int], Trained],
        steps: int,
        decided_by: Any,
        finish: Callable[[Path, Model], None] = lambda folder, model: None,
        shardings: Callable[[State], State] | None = None,
    ) -> Trained:
        """A run of `steps`; `finish` sees its folder and model before what it was made of is removed.

        `shardings` is that of `run_in_pieces`.

        Raises:
            InputError: as `run_in_pieces`, or a file cannot be read or written.
        """
        with self.place(name, decided_by) as (folder, mark), progress(name, steps, "steps") as advance:
            if (folder / DONE).exists():
                advance(steps)
                return _read_trained(folder / DONE, model)
            told = 0

            def report(done: int, _: int) -> None:
                nonlocal told
                advance(done - told)
                told = done

            try:
                run = run_in_pieces(
                    model, piece, steps, self.every, folder / PIECES, mark, report, shardings, name
                )
            except InputError as error:
                raise InputError(f"--saves, --save-every {self.every}: {error}") from error
            finish(folder, run.model)
            _write_trained(folder / DONE, run)
            shutil.rmtree(folder / PIECES)
            return run


def export(folder: Path, like: Checkpoint, model: Model, template: str) -> None:
    """A student for other programs: its factors as an adapter where peft knows such, else all of it.

    Raises:
        InputError: the folder cannot be written.
    """
    temporary, kept = folder / f".{STUDENT}.tmp", folder / STUDENT
    for left in (temporary, kept):  # by a run that ended before it was finished
        shutil.rmtree(left, ignore_errors=True)
    if fits_adapter(like, model):
        save_adapter(temporary, like, model, template=template)
    else:
        save_checkpoint(temporary, like, model)
    try:
        temporary.rename(kept)
    except OSError as error:
        raise InputError(f"--saves: cannot write {kept}: {error.strerror}") from error


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: delete it, and its rows are drawn again") from error


def _write_trained(path: Path, run: Trained) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    arrays: dict[str, Any] = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(run.model.params))}
    try:
        with open(temporary, "wb") as file:
            np.savez(file, losses=np.asarray(run.losses), **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"--saves: cannot write {path}: {error.strerror}") from error


def _read_trained(path: Path, model: Model) -> Trained:
    expected, tree = jax.tree.flatten(model.params)
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            leaves = [file[str(number)] for number in range(len(expected))]  # on no device yet
            losses = jnp.asarray(file["losses"])
    except Exception as error:  # the library raises many kinds for a damaged archive
        raise InputError(f"{path} cannot be read: delete it, and that model trains again") from error
    return Trained(model.with_params(jax.tree.unflatten(tree, leaves)), losses)
