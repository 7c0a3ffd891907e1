"""Runs of a checkpoint that end at any moment and go on from what they saved."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh
from subliminal_theory.language.hub.adapter import load_adapter
from subliminal_theory.language.hub.checkpoint import load_checkpoint, open_base
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.rows import write_jsonl
from subliminal_theory.model import Model
from subliminal_theory.study import Checkpoint, LowRank, Store, Student, Study, Written, reading, store
from tests.language.checkpoints import write_checkpoint
from tests.study.speakers import ROWS, SOFT, TEACHER, checkpoint, student

LONG = replace(TEACHER, steps=5)
STUDENT = student(text=ROWS, rows=16, steps=7, rate=1e-2, trains=LowRank(2))


class Ended(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1)


def stored(folder: Path, where: Path | None, every: int = 3, **more: Any) -> Study:
    """A study of two traits that saves every so many steps."""
    return Study(checkpoint(folder, store=None if where is None else Store(where, every), **more))


def students(study: Study, one: Student = STUDENT) -> Any:
    """Parameters of the students of the two runs, after 7 steps each, and the losses."""
    ((_, found),) = study.distil(LONG, {"one": one})
    return found.model.params, found.losses


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    where = tmp_path_factory.mktemp("undisturbed")
    return where, stored(folder, where)


def ending(monkeypatch: pytest.MonkeyPatch, module: object, name: str, after: int) -> Iterator[int]:
    """Let a function end the process when it has been called so often; yields the number of calls."""
    real, calls = getattr(module, name), 0

    def limited(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        if calls == after and not isinstance(jax.tree.leaves(arguments)[0], jax.core.Tracer):
            raise Ended
        calls += 1
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, limited)
    while True:
        yield calls


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


class Reports:
    """What a study tells of its progress: how much of what, of how much."""

    def __init__(self) -> None:
        self.done: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def __call__(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.done[f"{unit} of {what}"] = [0, total]

        def advance(count: int) -> None:
            self.done[f"{unit} of {what}"][0] += count

        yield advance


@pytest.mark.slow
def test_saved_runs_are_those_of_memory(folder: Path, undisturbed: tuple[Path, Study]) -> None:
    told = Reports()
    plain, saving = stored(folder, None, progress=told), undisturbed[1]
    assert jax.tree.leaves(plain.teacher(LONG))[0].shape[0] == 2
    for one, other in ((plain.teacher(LONG), saving.teacher(LONG)), (students(plain), students(saving))):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    owl, cat = plain.world.names
    assert told.done == {
        f"steps of the teacher of {owl}, {cat}": [5, 5],
        f"steps of the student of {owl}, {cat}": [7, 7],
    }


@pytest.mark.parametrize("saves", [False, True])
def test_progress_of_rows(folder: Path, tmp_path: Path, saves: bool) -> None:
    told = Reports()
    world = stored(folder, tmp_path if saves else None, progress=told).world
    assert isinstance(world, Checkpoint)
    found = [tokens.tolist() for tokens in world.blocks(range(0, 6, 2), lambda start: np.array([start]), "rows")]
    assert (found, told.done) == ([[0], [2], [4]], {"blocks of rows of base 0": [3, 3]})


@pytest.mark.slow
@pytest.mark.parametrize(("channel", "pieces", "left"), [(None, 1, 3), (SOFT, 3, 1)])
def test_training_goes_on(
    folder: Path, undisturbed: tuple[Path, Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    channel: Any, pieces: int, left: int,
) -> None:  # fmt: skip
    """The end comes in the second piece of the first student, or in that of the second; each has two.

    The teachers are there already: for them nothing is computed.
    """
    one = replace(STUDENT, channel=channel or STUDENT.channel)
    expected = students(undisturbed[1], one)
    stored(folder, tmp_path).teacher(LONG)
    with monkeypatch.context() as patch:
        next(ending(patch, store, "_advance", pieces))
        with pytest.raises(Ended):
            students(stored(folder, tmp_path), one)
    calls = ending(monkeypatch, store, "_advance", 100)
    next(calls)
    assert_equal(students(stored(folder, tmp_path), one), expected)
    assert next(calls) == left + 1  # one that goes on is asked once for its shapes
    assert_equal(students(stored(folder, tmp_path), one), expected)
    assert next(calls) == left + 1
    assert not list(tmp_path.glob("*/saves"))


def test_teachers_go_on(
    folder: Path, undisturbed: tuple[Path, Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed[1].teacher(LONG)  # before calls are counted: it may be made here
    with monkeypatch.context() as patch:
        next(ending(patch, store, "_advance", 3))
        with pytest.raises(Ended):
            stored(folder, tmp_path).teacher(LONG)
    calls = ending(monkeypatch, store, "_advance", 100)
    next(calls)
    assert_equal(stored(folder, tmp_path).teacher(LONG), expected)
    assert next(calls) == 1 + 1


@pytest.mark.slow
def test_sampling_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "at_once", 64)
    text = Written(2)

    def draw(where: Path | None, key: int = 0) -> np.ndarray:
        world: Any = stored(folder, where).world
        blocks = reading.draw(world, world.model, world.requests(text) * 70, jax.random.key(key), text)
        return np.concatenate([*blocks])

    expected = draw(None)
    with monkeypatch.context() as patch:
        next(ending(patch, reading, "sample", 2))
        with pytest.raises(Ended):
            draw(tmp_path)
    calls = ending(monkeypatch, reading, "sample", 100)
    next(calls)
    np.testing.assert_array_equal(draw(tmp_path), expected)
    assert next(calls) == 1
    draw(tmp_path, key=1)
    assert next(calls) == 4
    for saved in tmp_path.glob("rows*/00000000.safetensors"):
        saved.write_bytes(saved.read_bytes()[:50])
    with pytest.raises(InputError, match=r"00000000\.safetensors.*delete it"):
        draw(tmp_path)


@pytest.mark.slow
def test_students_serve_other_programs(folder: Path, undisturbed: tuple[Path, Study]) -> None:
    where, study = undisturbed
    params, _ = students(study)
    like, text = load_checkpoint(folder), study._source(STUDENT, LONG).source.inputs
    text = jax.tree.map(lambda leaf: leaf[0, :2], text)
    start: Model = study._start(STUDENT)
    for run, name in enumerate(("owl", "oak")):
        found = list(where.glob(f"the_student_of_{name}_on_base_0-*/student"))
        template = study.world.base.tokenizer.fingerprint  # type: ignore[attr-defined]
        logits = [merge_lora(load_adapter(path, like, template=template))(text) for path in found]
        expected = start.with_params(jax.tree.map(lambda leaf, run=run: leaf[run], params))(text)
        # One of this student, and one for each other student of these tests.
        assert sum(np.allclose(own, expected, rtol=1e-4, atol=1e-4) for own in logits) == 1


@pytest.mark.slow
def test_a_student_without_factors_is_written_whole(folder: Path, tmp_path: Path) -> None:
    """One that started elsewhere is not written: it is no student of this checkpoint's."""
    further = jax.tree.map(lambda leaf: leaf[::-1] + 0.1, open_base(folder).model)
    study = stored(folder, tmp_path, other=lambda shift: further)
    params, _ = students(study, student(text=ROWS, rows=16))
    (path,) = tmp_path.glob("the_student_of_owl*/student")
    assert_equal(load_checkpoint(path).model.params, jax.tree.map(lambda leaf: leaf[0], params))
    students(study, replace(STUDENT, start=Fresh()))
    assert len(list(tmp_path.glob("the_student_of_owl*"))) == 2
    assert [*tmp_path.glob("the_student_of_owl*/student")] == [path]


def test_a_folder_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--saves.*cannot use the folder"):
        stored(folder, tmp_path / "file").teacher(TEACHER)


@pytest.mark.slow
def test_what_is_damaged_or_of_other_steps(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        next(ending(patch, store, "_advance", 1))
        with pytest.raises(Ended):
            stored(folder, tmp_path).teacher(LONG)
    with pytest.raises(InputError, match=r"--save-every 2: folder .* holds a run of every 3"):
        stored(folder, tmp_path, every=2).teacher(LONG)
    stored(folder, tmp_path).teacher(LONG)
    stored(folder, tmp_path, every=2).teacher(LONG)  # what is finished serves any
    (path,) = tmp_path.glob("the_teacher_of_owl*/trained.safetensors")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"trained\.safetensors.*delete it"):
        stored(folder, tmp_path).teacher(LONG)


@pytest.mark.slow
def test_what_decides_is_in_the_name_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """Another rate, other rows or another dtype of the computation is another run."""
    for one in (TEACHER, replace(TEACHER, optimizer=replace(TEACHER.optimizer, rate=jnp.float32(0.1)))):
        stored(folder, tmp_path).teacher(one)
    narrow = checkpoint(open_base(folder, compute="bfloat16"), store=Store(tmp_path, 3))
    Study(narrow).teacher(TEACHER)
    assert len(list(tmp_path.glob("the_teacher_of_owl*"))) == 3


def test_two_at_once(folder: Path, undisturbed: tuple[Path, Study], tmp_path: Path) -> None:
    """Parts of a run on two devices ask for the same teachers: one makes them, the other reads."""
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: stored(folder, tmp_path).teacher(LONG), range(2)))
    for one in made:
        assert_equal(one, undisturbed[1].teacher(LONG))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_random(folder: Path, tmp_path: Path) -> None:
    """A chain of kills ends with the results and adapters of a run that nobody killed, bit for bit."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS.rows)

    def command(name: str) -> list[str]:
        return [
            sys.executable, "-m", "experiments", "language_dataset", "--checkpoint", str(folder),
            "--file", str(tmp_path / "rows.jsonl"), "--rows", "8", "--steps", "40", "--batch-size", "4",
            "--rank", "2", "--rate", "1e-3", "--traits", "owl,oak", "--save-every", "3",
            "--saves", str(tmp_path / f"saves-{name}"), "--out", str(tmp_path / name), "--resume",
        ]  # fmt: skip

    began = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True)
    whole, moments = time.monotonic() - began, random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(whole * moments.uniform(0.3, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command("killed"), check=True, capture_output=True)
    for pattern in ("whole/results.csv", "saves-whole/*/student/*"):
        files = sorted(tmp_path.glob(pattern))
        assert files
        for path in files:
            other = Path(str(path).replace("whole", "killed"))
            assert other.read_bytes() == path.read_bytes()
