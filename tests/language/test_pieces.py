"""Runs in pieces: what ends them, and going on to the same end.

Run as a program, this file is what the tests kill, or start with another number of devices.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subliminal_theory.channel import SoftLogits
from subliminal_theory.distill import State, Trained, distill
from subliminal_theory.errors import InputError
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.pieces import CHECKPOINTS, RECORD, piece_bounds, run_in_pieces
from subliminal_theory.model import Model
from subliminal_theory.source import Examples

WIDTH, CLASSES = 32, 16
INPUTS = jax.random.normal(jax.random.key(0), (40, WIDTH))


def network(params: Any, inputs: jax.Array) -> jax.Array:
    return jnp.tanh(inputs @ params["hidden"]) @ params["head"]


def models(width: int = 64) -> tuple[Model, Model]:
    """A student of which low-rank factors train (and a few leaves are None), and its teacher."""
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "hidden": jax.random.normal(keys[0], (WIDTH, width)) / 8,
        "head": jax.random.normal(keys[1], (width, CLASSES)) / 8,
    }
    teacher = {name: 2 * leaf for name, leaf in params.items()}
    return add_lora(Model(network, params), ["hidden"], 8, 8.0, keys[2]), Model(network, teacher)


def pieces(
    student: Model, teacher: Model, steps: int, optimizer: optax.GradientTransformation | None = None
) -> Callable[[State | None, int], Trained]:
    """As a caller has it, who also lets the arrays of a state be used again for the next."""
    chosen = optimizer or optax.adam(0.01)
    source = Examples(INPUTS, 8)

    @functools.partial(jax.jit, static_argnames="count", donate_argnames="state")
    def go_on(student, teacher, source, state, *, count: int):
        key = jax.random.key(2)
        return distill(student, teacher, SoftLogits(), source, chosen, steps, key, state=state, count=count)

    return lambda state, count: go_on(student, teacher, source, state, count=count)


def end(state: State | None, count: int) -> int:
    """The step at which a piece ends."""
    return count + (0 if state is None else int(state.step))


STEPS, EVERY = 11, 3
BOUNDS = [3, 6, 9, 11]
STUDENT, TEACHER = models()
PIECE = pieces(STUDENT, TEACHER, STEPS)


def run(folder: Path, piece: Callable[[State | None, int], Trained] = PIECE, **changed: Any) -> Trained:
    given: dict[str, Any] = {"steps": STEPS, "every": EVERY, "mark": "m", **changed}
    return run_in_pieces(STUDENT, piece, folder=folder, **given)


@functools.cache
def whole() -> Trained:
    """The run with no folder: piece by piece, by hand."""
    state, losses = None, []
    for until in BOUNDS:
        part = PIECE(state, until - end(state, 0))
        # A copy, as the next piece is given the arrays to use again.
        state, losses = part.state, [*losses, np.array(part.losses)]
    assert state is not None
    return Trained(STUDENT.with_params(state.params), jnp.concatenate(losses), state=state)


def assert_same(one: Trained, other: Trained) -> None:
    assert one.state is not None
    assert other.state is not None
    assert one.state.step == other.state.step
    assert jax.tree.structure(one.state) == jax.tree.structure(other.state)
    leaves = [(tree.model, tree.losses, tree.state) for tree in (one, other)]
    for left, right in zip(*map(jax.tree.leaves, leaves), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / CHECKPOINTS).iterdir())


@pytest.mark.parametrize(
    ("steps", "every", "bounds"),
    [(11, 3, BOUNDS), (9, 3, [3, 6, 9]), (10, 3, [3, 6, 10]), (4, 3, [4]), (2, 5, [2]), (3, 1, [1, 2, 3])],
)
def test_bounds(steps: int, every: int, bounds: list[int]) -> None:
    assert piece_bounds(steps, every) == bounds


def test_uninterrupted(tmp_path: Path) -> None:
    """Nothing is lost or added on the way, and a finished run is only read."""
    reports: list[tuple[int, int]] = []
    result = run(tmp_path / "a" / "b", report=lambda *given: reports.append(given))
    assert reports == [(until, STEPS) for until in BOUNDS]
    assert_same(result, whole())
    assert saved(tmp_path / "a" / "b") == BOUNDS[-2:]
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [CHECKPOINTS, RECORD]
    again = run(tmp_path / "a" / "b", report=lambda *given: reports.append(given))
    assert reports[len(BOUNDS) :] == [(STEPS, STEPS)]
    assert_same(again, result)


class Interrupted(Exception):
    """Not one the library knows."""


def traced(part: Trained) -> bool:
    return isinstance(part.losses, jax.core.Tracer)


@pytest.mark.parametrize("where", ["piece", "report"])
def test_interrupted_at_every_piece(tmp_path: Path, where: str) -> None:
    """Each call makes one piece and is then interrupted: no step is made twice, and the end is the same."""
    made: list[int] = []

    def piece(state: State | None, count: int) -> Trained:
        until = end(state, count)
        if where == "piece" and until > allowed:
            raise Interrupted
        part = PIECE(state, count)
        if not traced(part):
            made.append(until)
        return part

    def report(done: int, steps: int) -> None:
        if where == "report" and done == allowed:
            raise Interrupted

    for allowed in BOUNDS[:-1]:
        with pytest.raises(Interrupted):
            run(tmp_path, piece, report=report)
        assert saved(tmp_path)[-1] == allowed
    allowed = STEPS + 1
    assert_same(run(tmp_path, piece, report=report), whole())
    assert made == BOUNDS


def until_step(last: int) -> Callable[[State | None, int], Trained]:
    """A piece that is interrupted after that step."""

    def piece(state: State | None, count: int) -> Trained:
        if end(state, count) > last:
            raise Interrupted
        return PIECE(state, count)

    return piece


def begun(folder: Path, last: int = 9) -> Path:
    with pytest.raises(Interrupted):
        run(folder, until_step(last))
    return folder


@pytest.fixture
def failed_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After a failed read, Orbax closes its event loop, and other reads that end later complain to nobody."""
    hook = sys.unraisablehook

    def others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    monkeypatch.setattr(sys, "unraisablehook", others)
    yield
    time.sleep(0.1)


@pytest.mark.usefixtures("failed_reads")
@pytest.mark.parametrize("damage", ["half", "empty", "gone"])
def test_damaged_newest(tmp_path: Path, damage: str) -> None:
    """All of its files: the run goes on from the checkpoint before, and saves that step again."""
    begun(tmp_path)
    assert saved(tmp_path) == [6, 9]
    for file in files(tmp_path / CHECKPOINTS / "9"):
        if damage == "gone":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2 if damage == "half" else 0)
    reports: list[int] = []
    with pytest.raises(Interrupted):
        run(tmp_path, until_step(9), report=lambda done, steps: reports.append(done))
    assert reports == [6, 9]
    assert_same(run(tmp_path, report=lambda done, steps: reports.append(done)), whole())
    assert reports == [6, 9, 9, 11]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("failed_reads")
def test_each_file_truncated_or_missing(tmp_path: Path) -> None:
    """A damaged checkpoint is passed over, or is read as it was where the file holds no numbers."""
    begun(tmp_path / "from")
    passed = 0
    for number, file in enumerate(files(tmp_path / "from" / CHECKPOINTS / "9")):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "from", folder)
        damaged = folder / file.relative_to(tmp_path / "from")
        if number % 2:
            damaged.unlink()
        else:
            os.truncate(damaged, file.stat().st_size // 2)
        reports: list[int] = []
        assert_same(run(folder, report=lambda done, steps, reports=reports: reports.append(done)), whole())
        assert reports in ([9, 11], [6, 9, 11])
        passed += reports[0] == 6
    assert passed >= 3


def test_half_written(tmp_path: Path) -> None:
    """What a kill leaves of a save is not loaded, not in the way of the same save, and does not stay."""
    begun(tmp_path, 6)
    for name in ("9.orbax-checkpoint-tmp", "10.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / CHECKPOINTS / "6", tmp_path / CHECKPOINTS / name)
    reports: list[int] = []
    assert_same(run(tmp_path, report=lambda done, steps: reports.append(done)), whole())
    assert reports == [6, 9, 11]
    assert saved(tmp_path) == [9, 11]


@pytest.mark.usefixtures("failed_reads")
def test_all_damaged(tmp_path: Path) -> None:
    begun(tmp_path)
    for file in files(tmp_path / CHECKPOINTS):
        os.truncate(file, file.stat().st_size // 2)
    found = files(tmp_path)
    with pytest.raises(
        InputError, match=r"^no checkpoint in folder .* can be read \(.*\): remove the folder"
    ) as error:
        run(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == found


@pytest.mark.usefixtures("failed_reads")
def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    """The mark should have said so; Orbax would cut arrays to the shape asked for."""
    begun(tmp_path)
    student, teacher = models(48)
    with pytest.raises(InputError, match=r"^no checkpoint in folder"):
        run_in_pieces(student, pieces(student, teacher, STEPS), STEPS, EVERY, tmp_path, "m")


def test_random_keys_in_the_state(tmp_path: Path) -> None:
    """They are typed keys, where an optimiser draws noise; with numbers of 16 bits."""

    def piece(state: State | None, count: int) -> Trained:
        key, step = (jax.random.key(7), 0) if state is None else (state.optimizer[0], int(state.step))
        after, drawn = jax.random.split(key)
        params = {"a": jax.random.normal(drawn, (3,), jnp.bfloat16), "none": None}
        after, until = (after, ()), step + count
        return Trained(
            STUDENT, jnp.arange(step, until, dtype=jnp.float32), state=State(params, after, jnp.int32(until))
        )

    def report(done: int, steps: int) -> None:
        if done == 6:
            raise Interrupted

    expected = run(tmp_path / "whole", piece)
    with pytest.raises(Interrupted):
        run(tmp_path / "pieces", piece, report=report)
    for folder in ("pieces", "whole"):
        result = run(tmp_path / folder, piece)
        np.testing.assert_array_equal(result.losses, np.arange(STEPS))
        assert jax.tree.structure(result.state) == jax.tree.structure(expected.state)
        for one, other in zip(jax.tree.leaves(result.state), jax.tree.leaves(expected.state), strict=True):
            assert one.dtype == other.dtype
            assert (one == other).all()


def test_diverged(tmp_path: Path) -> None:
    """The bad piece is not saved, and the step is that of the run."""

    def piece(state: State | None, count: int) -> Trained:
        until = end(state, count)
        part = PIECE(state, count)
        return part if until < 6 else dataclasses.replace(part, losses=part.losses.at[1].set(jnp.nan))

    with pytest.raises(InputError, match=r"^the loss of the student is not finite at step 5 of 11: use a smaller"):
        run(tmp_path, piece)
    assert saved(tmp_path) == [3]


def test_piece_that_does_not_stop(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^the piece up to step 3 did not stop there: pass it `state` and `count`$"
    ):
        run(tmp_path, lambda state, count: PIECE(state, STEPS))


@pytest.mark.parametrize("name", ["steps", "every"])
def test_no_steps(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"^run_in_pieces: {name} must be at least 1, got 0$"):
        run(tmp_path / "new", **{name: 0})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "had", "given"), [("mark", "m", "other"), ("steps", 11, 12), ("every", 3, 4)])
def test_of_another_run(tmp_path: Path, name: str, had: Any, given: Any) -> None:
    begun(tmp_path, 3)
    match = f"holds a run of {name} {had}, and this one has {name} {given}: choose another folder$"
    with pytest.raises(InputError, match=match):
        run(tmp_path, **{name: given})
    assert saved(tmp_path) == [3]


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"^folder .*file is a file: choose another folder$"):
        run(file)
    with pytest.raises(InputError, match=r"^cannot use folder .*below: .*: choose another folder$"):
        run(file / "below")
    with pytest.raises(InputError, match=r"^folder .* holds something else \(file\): choose an empty or new one$"):
        run(tmp_path)
    for text in ("", "[]", "{}", '{"format": 1}'):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(
            InputError, match=rf"{RECORD} is damaged or of another version: choose another folder$"
        ):
            run(tmp_path)
    assert file.read_text() == "mine"

    def read_only(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(InputError, match=r"^cannot use folder .*: Read-only file system: choose another folder$"):
        run(tmp_path / "new")


def test_killed_before_the_record(tmp_path: Path) -> None:
    """What such a kill leaves is no obstacle, and a folder may be given from here."""
    (tmp_path / f".{RECORD}.tmp").write_text('{"form')
    where = Path(os.path.relpath(tmp_path))
    assert_same(run(where), whole())
    assert json.loads((tmp_path / RECORD).read_text())["mark"] == "m"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of the size of files")
def test_full_disk(tmp_path: Path) -> None:
    """Saving fails in the background: one line says so, and the run goes on when there is room."""
    lines = child("full", tmp_path).communicate(timeout=120)[0].splitlines()
    assert lines[-1].startswith(f"error: cannot save to folder {tmp_path} (")
    assert lines[-1].endswith("): make room, then call again to go on")
    assert_same(run(tmp_path), whole())


def child(what: str, folder: Path, devices: int = 1) -> "subprocess.Popen[str]":
    """This file as a program, with a number of devices, in the environment of the tests."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.language.test_pieces", what, str(folder)],
        cwd=root, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_on_other_devices(tmp_path: Path) -> None:
    """Saved on 1 device, resumed on 8 with every matrix split, and read on 1 again."""
    begun(tmp_path, 6)
    process = child("sharded", tmp_path, 8)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert printed.splitlines() == ["6", "9", "11"]
    result = run(tmp_path, until_step(3))
    np.testing.assert_array_equal(result.losses[:6], whole().losses[:6])
    np.testing.assert_allclose(result.losses, whole().losses, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(result.model), jax.tree.leaves(whole().model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


LONG, KILLS = 45, 10


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_ten_times(tmp_path: Path) -> None:
    """At moments spread over start, pieces and saves: the end is the same bit for bit, and little is lost."""
    expected = run_in_pieces(STUDENT, pieces(STUDENT, TEACHER, LONG), LONG, EVERY, tmp_path / "whole", "m")
    folder, half_written, resumed, pause = tmp_path / "killed", 0, 0, 0.5
    for kill in range(KILLS):
        process = child("long", folder)
        assert process.stdout is not None
        # The start; after a piece, while it is saved; in the next pieces. Where it goes on, it says so first.
        lines, done, times = (1, 2 + (resumed > 0), 3 + (resumed > 0))[kill % 3], 0, []
        for _ in range(lines):
            done = int(process.stdout.readline())
            times.append(time.monotonic())
        pause = times[-1] - times[-2] if kill % 3 == 2 else pause  # that of one piece
        time.sleep(0.02 * kill if kill % 3 == 1 else pause * kill / KILLS)
        process.send_signal(signal.SIGKILL)
        done = max([done, resumed, *map(int, process.communicate()[0].split())])
        assert process.returncode == -signal.SIGKILL
        names = [path.name for path in (folder / CHECKPOINTS).glob("*")]
        half_written += any(not name.isdigit() for name in names)
        newest = max([int(name) for name in names if name.isdigit()], default=0)
        assert resumed <= newest
        assert 0 <= done - newest <= EVERY  # of the steps in pieces that were made
        resumed = newest
        print(f"kill {kill}: step {done} was done, there are {names}")
    assert half_written
    process = child("long", folder)
    process.communicate(timeout=120)
    assert process.returncode == 0

    def never(state: State | None, count: int) -> Trained:
        assert state is None, "the run is finished"
        return pieces(STUDENT, TEACHER, LONG)(state, count)

    assert_same(run_in_pieces(STUDENT, never, LONG, EVERY, folder, "m"), expected)


def say(done: int, steps: int) -> None:
    print(done, flush=True)


def run_long(folder: Path) -> None:
    say(0, LONG)
    run_in_pieces(STUDENT, pieces(STUDENT, TEACHER, LONG), LONG, EVERY, folder, "m", say)


def run_sharded(folder: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())

    def shardings(state: State) -> State:
        return jax.tree.map(lambda leaf: NamedSharding(mesh, P("x")) if leaf.ndim == 2 else everywhere, state)

    student, teacher = jax.device_put((STUDENT, TEACHER), everywhere)
    go_on = pieces(student, teacher, STEPS)

    def piece(state: State | None, count: int) -> Trained:
        for leaf in jax.tree.leaves(state):
            assert leaf.ndim != 2 or len({str(shard.index) for shard in leaf.addressable_shards}) == 8
        return go_on(state, count)

    run_in_pieces(student, piece, STEPS, EVERY, folder, "m", say, shardings)


def run_full(folder: Path) -> None:
    import resource

    def report(done: int, steps: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    try:
        run(folder, report=report)
    except InputError as error:
        print(f"error: {error}")


if __name__ == "__main__":
    {"long": run_long, "sharded": run_sharded, "full": run_full}[sys.argv[1]](Path(sys.argv[2]))
