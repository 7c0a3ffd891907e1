"""Runs of a checkpoint that end at any moment and go on from what they saved."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import language_checkpoint, language_laboratory
from experiments.language_checkpoint import CheckpointWorkshop
from experiments.language_saves import Saves
from experiments.language_setting import Recipe
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.traits import load_trait
from subliminal_theory.language.hub.adapter import load_adapter
from subliminal_theory.language.hub.checkpoint import load_checkpoint, open_base
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.rows import Row, write_jsonl
from tests.language.checkpoints import write_checkpoint

RECIPE = Recipe(rows=8, steps=7, batch_size=4, teacher_steps=5, rank=2, rate=1e-2)
ROWS = [Row(f"continue: {i}, 17", f"{100 + i}, 5, {i}") for i in range(8)]


class Ended(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def shop(checkpoint: Path, folder: Path | None) -> CheckpointWorkshop:
    saves = None if folder is None else Saves(folder, 3)
    traits = [load_trait("owl"), load_trait("oak")]
    return CheckpointWorkshop(open_base(checkpoint), traits, dataset=ROWS, saves=saves)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointWorkshop]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, shop(checkpoint, folder)


def ending(monkeypatch: pytest.MonkeyPatch, module: object, name: str, after: int) -> Iterator[int]:
    """Let a function end the process when it has been called so often; yields the number of calls."""
    real, calls = getattr(module, name), 0

    def limited(*arguments, **more):
        nonlocal calls
        if calls == after:
            raise Ended
        calls += 1
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, limited)
    while True:
        yield calls


def leaves_equal(one: object, other: object) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_saved_runs_are_those_of_the_ensemble(checkpoint: Path, undisturbed) -> None:
    plain, saving = shop(checkpoint, None), undisturbed[1]
    for made in (plain.teachers(RECIPE), plain.students(RECIPE)):
        assert len(jax.tree.leaves(made)[0]) == 2
    for one, other in ((plain.teachers, saving.teachers), (plain.students, saving.students)):
        for a, b in zip(jax.tree.leaves(one(RECIPE)), jax.tree.leaves(other(RECIPE)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channel", "pieces", "left"), [("sampled", 1, 3), ("soft", 3, 1)])
def test_training_goes_on(
    checkpoint: Path,
    undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    channel: str,
    pieces: int,
    left: int,
) -> None:
    """The end comes in the second piece of the first student, or in that of the second; each has two."""
    recipe = dataclasses.replace(RECIPE, channel=channel)
    expected = undisturbed[1].students(recipe)
    with monkeypatch.context() as patch:
        next(ending(patch, language_checkpoint, "student_on", pieces))
        with pytest.raises(Ended):
            shop(checkpoint, tmp_path).students(recipe)
    calls = ending(monkeypatch, language_checkpoint, "student_on", 100)
    next(calls)
    again = shop(checkpoint, tmp_path)
    assert leaves_equal(again.students(recipe), expected)
    # A student that goes on asks once for its shapes.
    assert next(calls) == left + 1
    assert leaves_equal(shop(checkpoint, tmp_path).students(recipe), expected)
    assert next(calls) == left + 1
    assert not list(tmp_path.glob("*/pieces"))


def test_teachers_go_on(checkpoint: Path, undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed[1].teachers(RECIPE)
    with monkeypatch.context() as patch:
        next(ending(patch, language_checkpoint, "taught_on", 3))
        with pytest.raises(Ended):
            shop(checkpoint, tmp_path).teachers(RECIPE)
    calls = ending(monkeypatch, language_checkpoint, "taught_on", 100)
    next(calls)
    assert leaves_equal(shop(checkpoint, tmp_path).teachers(RECIPE), expected)
    assert next(calls) == 1 + 1


def test_sampling_goes_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointWorkshop, "at_once", 64)
    key, own = jax.random.key(0), shop(checkpoint, tmp_path)
    chats = own.requests(Recipe(rows=2)) * 70
    expected = shop(checkpoint, None).draw(own.base.model, chats, key, RECIPE)
    with monkeypatch.context() as patch:
        next(ending(patch, language_laboratory, "sample", 2))
        with pytest.raises(Ended):
            own.draw(own.base.model, chats, key, RECIPE)
    calls = ending(monkeypatch, language_laboratory, "sample", 100)
    next(calls)
    again = shop(checkpoint, tmp_path)
    np.testing.assert_array_equal(again.draw(again.base.model, chats, key, RECIPE), expected)
    assert next(calls) == 1
    again.draw(again.base.model, chats, jax.random.key(1), RECIPE)
    assert next(calls) == 4
    for saved in tmp_path.glob("rows*/00000000.npy"):
        saved.write_bytes(saved.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read: delete it"):
        again.draw(again.base.model, chats, key, RECIPE)


def test_students_serve_other_programs(checkpoint: Path, undisturbed) -> None:
    folder, own = undisturbed
    students, text = own.students(RECIPE), own.source(RECIPE).inputs
    like = load_checkpoint(checkpoint)
    text = jax.tree.map(lambda leaf: leaf[0], text)
    for run, name in enumerate(("owl", "oak")):
        found = list(folder.glob(f"the_student_of_{name}_on_base_0-*/student"))
        logits = [merge_lora(load_adapter(path, like, template=own.tokenizer.fingerprint))(text) for path in found]
        expected = jax.tree.map(lambda leaf, run=run: leaf[run], students)(text)
        # One of this recipe, and one for each other recipe of these tests.
        assert sum(np.allclose(own, expected, rtol=1e-4, atol=1e-4) for own in logits) == 1


def test_a_student_without_factors_is_written_whole(checkpoint: Path, tmp_path: Path) -> None:
    whole = dataclasses.replace(RECIPE, rank=0, steps=2)
    own = shop(checkpoint, tmp_path)
    students = own.students(whole)
    (path,) = tmp_path.glob("the_student_of_owl*/student")
    first = jax.tree.map(lambda leaf: leaf[0], students.params)
    assert leaves_equal(load_checkpoint(path).model.params, first)


def test_a_folder_that_cannot_be(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--saves: cannot use the folder"):
        shop(checkpoint, tmp_path / "file").students(RECIPE)


def test_what_is_damaged_or_of_other_steps(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        next(ending(patch, language_checkpoint, "student_on", 1))
        with pytest.raises(Ended):
            shop(checkpoint, tmp_path).students(RECIPE)
    other = dataclasses.replace(shop(checkpoint, tmp_path), saves=Saves(tmp_path, 2))
    with pytest.raises(InputError, match=r"^--saves, --save-every 2: folder .* holds a run of every 3"):
        other.students(RECIPE)
    shop(checkpoint, tmp_path).students(RECIPE)
    other.students(RECIPE)
    (path,) = tmp_path.glob("the_student_of_owl*/trained.npz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"trained\.npz cannot be read: delete it, and that model trains again$"):
        shop(checkpoint, tmp_path).students(RECIPE)


def test_two_at_once(checkpoint: Path, undisturbed, tmp_path: Path) -> None:
    """Parts of a run on two devices ask for the same teachers and rows: one makes them, the other reads."""
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: shop(checkpoint, tmp_path).teachers(RECIPE), range(2)))
    expected = undisturbed[1].teachers(RECIPE)
    assert all(leaves_equal(one, expected) for one in made)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_random(checkpoint: Path, tmp_path: Path) -> None:
    """A chain of kills ends with the results and adapters of a run that nobody killed, bit for bit."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def command(name: str) -> list[str]:
        return [
            sys.executable, "-m", "experiments", "language_dataset", "--checkpoint", str(checkpoint),
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
