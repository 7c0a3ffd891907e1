"""What a checkpoint's runs keep on disk, so that they go on after any end, with the same numbers.

A folder for each thing that takes long, its name a hash of all that decides it: the rows of a teacher, saved block
by block, and the training of a teacher or student, saved every so many steps. A finished one is only read.
"""

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.progress import progress
from subliminal_theory.distill import State, Trained
from subliminal_theory.errors import InputError
from subliminal_theory.language.adapter import save_adapter
from subliminal_theory.language.checkpoint import Checkpoint, save_checkpoint
from subliminal_theory.language.pieces import mark_of, run_in_pieces
from subliminal_theory.model import Model
from subliminal_theory.runs import write_atomically


@dataclass(frozen=True)
class Saves:
    """A folder, and after how many steps training is saved."""

    folder: Path
    every: int

    def place(self, name: str, mark: str) -> Path:
        """The folder of one thing."""
        return self.folder / f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)}-{mark[:16]}"

    def blocks(
        self, name: str, starts: range, block: Callable[[int], np.ndarray], decided_by: Any
    ) -> list[np.ndarray]:
        """What `block` gives for every start, from disk where it is there.

        Raises:
            InputError: a file cannot be read or written.
        """
        folder = self.place(f"rows {name}", mark_of(decided_by, starts))
        found = []
        with progress(f"rows of {name}", len(starts), "blocks") as advance:
            for start in starts:
                path = folder / f"{start:08d}.npy"
                if path.exists():
                    found.append(_read(path))
                else:
                    found.append(block(start))
                    stream = io.BytesIO()
                    np.save(stream, found[-1])
                    _make(folder)
                    write_atomically(path, stream.getvalue())
                advance(1)
        return found

    def trained(
        self, name: str, model: Model, piece: Callable[[State | None, int], Trained], steps: int, decided_by: Any
    ) -> tuple[Trained, Path]:
        """A run of `steps`, and its folder; raises as `run_in_pieces`."""
        mark = mark_of(decided_by)
        folder = self.place(name, mark)
        _make(folder)
        with progress(name, steps, "steps") as advance:
            told = 0

            def report(done: int, _: int) -> None:
                nonlocal told
                advance(done - told)
                told = done

            return run_in_pieces(model, piece, steps, self.every, folder / "pieces", mark, report), folder


def export(folder: Path, like: Checkpoint, model: Model, template: str) -> None:
    """A student, its factors as an adapter or else whole, for other programs; once.

    Raises:
        InputError: the folder cannot be written.
    """
    if (folder / "student").exists():
        return
    temporary = folder / ".student.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_adapter(temporary, like, model, template=template)
    except InputError:  # no factors, or such as peft does not know
        shutil.rmtree(temporary, ignore_errors=True)
        save_checkpoint(temporary, like, model)
    temporary.rename(folder / "student")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--saves: cannot make the folder {folder}: {error.strerror}") from error


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: delete it, and its rows are drawn again") from error
