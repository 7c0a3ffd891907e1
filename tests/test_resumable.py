"""Resumable runs: what ends them, and going on to the same end.

Run as a program, this file is what the tests kill, or start with another number of devices.
"""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
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
from subliminal_theory.model import Model
from subliminal_theory.resumable import Advance, run_resumably, save_steps
from subliminal_theory.source import Examples

WIDTH, CLASSES = 32, 16
INPUTS = jax.random.normal(jax.random.key(0), (40, WIDTH))


def network(params: Any, inputs: jax.Array) -> jax.Array:
    return jnp.tanh(inputs @ params["hidden"]) @ params["head"]


def models(width: int = 64) -> tuple[Model, Model]:
    """A student with low-rank factors, so that a few leaves of what trains are None, and its teacher."""
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "hidden": jax.random.normal(keys[0], (WIDTH, width)) / 8,
        "head": jax.random.normal(keys[1], (width, CLASSES)) / 8,
    }
    teacher = {name: 2 * leaf for name, leaf in params.items()}
    return add_lora(Model(network, params), ["hidden"], 8, 8.0, keys[2]), Model(network, teacher)


def advances(
    student: Model, teacher: Model, steps: int, optimizer: optax.GradientTransformation | None = None
) -> Advance:
    """As a caller has it, who also lets the arrays of a state be used again for the next."""
    chosen = optimizer or optax.adam(0.01)
    source = Examples(INPUTS, 8)

    @functools.partial(jax.jit, static_argnames="count", donate_argnames="state")
    def go_on(student, teacher, source, state, *, count: int):
        key = jax.random.key(2)
        return distill(student, teacher, SoftLogits(), source, chosen, steps, key=key, state=state, count=count)

    return lambda state, count: go_on(student, teacher, source, state, count=count)


def end(state: State | None, count: int) -> int:
    """The step at which a call ends."""
    return count + (0 if state is None else int(state.step))


STEPS, EVERY = 11, 3
BOUNDS = [3, 6, 9, 11]
STUDENT, TEACHER = models()
ADVANCE = advances(STUDENT, TEACHER, STEPS)


def run(folder: Path, advance: Advance = ADVANCE, **changed: Any) -> Trained:
    given: dict[str, Any] = {"steps": STEPS, "every": EVERY, "fingerprint": "m", **changed}
    return run_resumably(STUDENT, advance, folder=folder, **given)


@functools.cache
def whole() -> Trained:
    """The run with no folder, from one save's step to the next by hand."""
    state, losses = None, []
    for until in BOUNDS:
        part = ADVANCE(state, until - end(state, 0))
        # A copy, as the next call is given the arrays to use again.
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
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))


@pytest.mark.parametrize(
    ("steps", "every", "bounds"),
    [(11, 3, BOUNDS), (9, 3, [3, 6, 9]), (10, 3, [3, 6, 10]), (4, 3, [4]), (2, 5, [2]), (3, 1, [1, 2, 3])],
)
def test_bounds(steps: int, every: int, bounds: list[int]) -> None:
    assert save_steps(steps, every) == bounds


@pytest.mark.slow
def test_uninterrupted(tmp_path: Path) -> None:
    """Nothing is lost or added on the way, and a finished run is only read."""
    reports: list[tuple[int, int]] = []
    result = run(tmp_path / "a" / "b", report=lambda *given: reports.append(given))
    assert reports == [(until, STEPS) for until in BOUNDS]
    assert_same(result, whole())
    assert saved(tmp_path / "a" / "b") == BOUNDS[-2:]
    assert [path.name for path in files(tmp_path)] == [
        ".lock", "step-00000009.safetensors", "step-00000011.safetensors"
    ]  # fmt: skip
    again = run(tmp_path / "a" / "b", report=lambda *given: reports.append(given))
    assert reports[len(BOUNDS) :] == [(STEPS, STEPS)]
    assert_same(again, result)


class Interrupted(Exception):
    """Not one the library knows."""


def traced(part: Trained) -> bool:
    return isinstance(part.losses, jax.core.Tracer)


@pytest.mark.parametrize("where", ["advance", "report"])
def test_interrupted_at_every_save(tmp_path: Path, where: str) -> None:
    """Each call saves once and is then interrupted: no step is made twice, and the end is the same."""
    made: list[int] = []

    def advance(state: State | None, count: int) -> Trained:
        until = end(state, count)
        if where == "advance" and until > allowed:
            raise Interrupted
        part = ADVANCE(state, count)
        if not traced(part):
            made.append(until)
        return part

    def report(done: int, steps: int) -> None:
        if where == "report" and done == allowed:
            raise Interrupted

    for allowed in BOUNDS[:-1]:
        with pytest.raises(Interrupted):
            run(tmp_path, advance, report=report)
        assert saved(tmp_path)[-1] == allowed
    allowed = STEPS + 1
    assert_same(run(tmp_path, advance, report=report), whole())
    assert made == BOUNDS


def until_step(last: int) -> Advance:
    """Training that is interrupted after that step."""

    def advance(state: State | None, count: int) -> Trained:
        if end(state, count) > last:
            raise Interrupted
        return ADVANCE(state, count)

    return advance


def begun(folder: Path, last: int = 9) -> Path:
    with pytest.raises(Interrupted):
        run(folder, until_step(last))
    return folder


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "flipped"])
def test_damaged_newest(tmp_path: Path, damage: str) -> None:
    """The run goes on from the save before, and saves that step again."""
    begun(tmp_path)
    assert saved(tmp_path) == [6, 9]
    newest = files(tmp_path)[-1]
    data = newest.read_bytes()
    if damage == "gone":
        newest.unlink()
    elif damage == "flipped":
        newest.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        os.truncate(newest, len(data) // 2 if damage == "half" else 0)
    reports: list[int] = []
    with pytest.raises(Interrupted):
        run(tmp_path, until_step(9), report=lambda done, steps: reports.append(done))
    assert reports == [6, 9]
    assert_same(run(tmp_path, report=lambda done, steps: reports.append(done)), whole())
    assert reports == [6, 9, 9, 11]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_half_written(tmp_path: Path) -> None:
    """What a kill leaves of a save is not loaded, not in the way of the same save, and does not stay."""
    begun(tmp_path, 6)
    for step in (9, 10):
        (tmp_path / f".step-{step:08}.safetensors.12.tmp").write_bytes(files(tmp_path)[-1].read_bytes())
    reports: list[int] = []
    assert_same(run(tmp_path, report=lambda done, steps: reports.append(done)), whole())
    assert reports == [6, 9, 11]
    assert [path.name[:5] for path in files(tmp_path)] == [".lock", "step-", "step-"]


def test_all_damaged(tmp_path: Path) -> None:
    begun(tmp_path)
    for file in files(tmp_path):
        os.truncate(file, file.stat().st_size // 2)
    found = files(tmp_path)
    with pytest.raises(InputError, match=r"^no save in .* can be read \(.*\): remove the folder") as error:
        run(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == found


@pytest.mark.slow
def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    """The fingerprint should have said so."""
    begun(tmp_path)
    student, teacher = models(48)
    with pytest.raises(InputError, match=r"does not have .*params/hidden/b is \[8, 64\], not \[8, 48\]"):
        run_resumably(student, advances(student, teacher, STEPS), STEPS, EVERY, tmp_path, "m")


def test_random_keys_in_the_state(tmp_path: Path) -> None:
    """They are typed keys, where an optimizer draws noise; with numbers of 16 bits."""

    def advance(state: State | None, count: int) -> Trained:
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

    expected = run(tmp_path / "whole", advance)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", advance, report=report)
    for folder in ("parts", "whole"):
        result = run(tmp_path / folder, advance)
        np.testing.assert_array_equal(result.losses, np.arange(STEPS))
        assert jax.tree.structure(result.state) == jax.tree.structure(expected.state)
        for one, other in zip(jax.tree.leaves(result.state), jax.tree.leaves(expected.state), strict=True):
            assert one.dtype == other.dtype
            assert (one == other).all()


def test_diverged(tmp_path: Path) -> None:
    """The bad steps are not saved, and the message counts from the start of the run."""

    def advance(state: State | None, count: int) -> Trained:
        until = end(state, count)
        part = ADVANCE(state, count)
        return part if until < 6 else dataclasses.replace(part, losses=part.losses.at[1].set(jnp.nan))

    with pytest.raises(InputError, match=r"^the loss of the student is not finite at step 5 of 11: use a smaller"):
        run(tmp_path, advance)
    assert saved(tmp_path) == [3]


def test_training_that_does_not_stop(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^training to step 3 did not stop there: pass `state` and `count` on$"):
        run(tmp_path, lambda state, count: ADVANCE(state, STEPS))


@pytest.mark.parametrize("name", ["steps", "every"])
def test_no_steps(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"^run_resumably: {name} must be at least 1, got 0$"):
        run(tmp_path / "new", **{name: 0})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "had", "given"), [("fingerprint", "m", "other"), ("steps", 11, 12), ("every", 3, 4)]
)
def test_of_another_run(tmp_path: Path, name: str, had: Any, given: Any) -> None:
    begun(tmp_path, 3)
    match = f"holds a run of {name} {had}, and this one has {name} {given}: choose another folder$"
    with pytest.raises(InputError, match=match):
        run(tmp_path, **{name: given})
    assert saved(tmp_path) == [3]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below"):
        with pytest.raises(InputError, match=rf"^cannot use the folder {folder}: .*; choose another folder$"):
            run(folder)
    with pytest.raises(InputError, match=r"holds something else \(file\): choose an empty or new one$"):
        run(tmp_path)
    assert file.read_text() == "mine"


def test_relative_folder(tmp_path: Path) -> None:
    assert_same(run(Path(os.path.relpath(tmp_path))), whole())


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of the size of files")
def test_full_disk(tmp_path: Path) -> None:
    """Saving fails in the background: one line says so, and the run goes on when there is room."""
    lines = child("full", tmp_path).communicate(timeout=120)[0].splitlines()
    assert lines[-1].startswith(f"error: the disk is full: could not write {tmp_path}")
    assert_same(run(tmp_path), whole())


def child(what: str, folder: Path, devices: int = 1) -> "subprocess.Popen[str]":
    """This file as a program, with a number of devices, in the environment of the tests."""
    # With the flags of this process: other compilation rounds otherwise.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.test_resumable", what, str(folder)],
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
    """At moments spread over start, training and saves: the end is the same bit for bit, and little is lost."""
    expected = run_resumably(STUDENT, advances(STUDENT, TEACHER, LONG), LONG, EVERY, tmp_path / "whole", "m")
    folder, half_written, resumed, pause = tmp_path / "killed", 0, 0, 0.5
    for kill in range(KILLS):
        process = child("long", folder)
        assert process.stdout is not None
        # The start; after some steps, while they are saved; in the next. Where it goes on, it says so first.
        lines, done, times = (1, 2 + (resumed > 0), 3 + (resumed > 0))[kill % 3], 0, []
        for _ in range(lines):
            done = int(process.stdout.readline())
            times.append(time.monotonic())
        pause = times[-1] - times[-2] if kill % 3 == 2 else pause  # from save to save
        time.sleep(0.02 * kill if kill % 3 == 1 else pause * kill / KILLS)
        process.send_signal(signal.SIGKILL)
        done = max([done, resumed, *map(int, process.communicate()[0].split())])
        assert process.returncode == -signal.SIGKILL
        half_written += any(folder.glob(".step-*.tmp"))
        newest = max(saved(folder), default=0)
        assert resumed <= newest
        assert 0 <= done - newest <= EVERY
        resumed = newest
        print(f"kill {kill}: step {done} was done, {saved(folder)} are saved")
    assert half_written
    process = child("long", folder)
    process.communicate(timeout=120)
    assert process.returncode == 0

    def never(state: State | None, count: int) -> Trained:
        assert state is None, "the run is finished"
        return advances(STUDENT, TEACHER, LONG)(state, count)

    assert_same(run_resumably(STUDENT, never, LONG, EVERY, folder, "m"), expected)


def say(done: int, steps: int) -> None:
    print(done, flush=True)


def run_long(folder: Path) -> None:
    fsync = os.fsync

    def slow(file: int) -> None:
        time.sleep(0.1)
        fsync(file)

    os.fsync = slow
    say(0, LONG)
    run_resumably(STUDENT, advances(STUDENT, TEACHER, LONG), LONG, EVERY, folder, "m", say)


def run_sharded(folder: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())

    def shardings(state: State) -> State:
        return jax.tree.map(lambda leaf: NamedSharding(mesh, P("x")) if leaf.ndim == 2 else everywhere, state)

    student, teacher = jax.device_put((STUDENT, TEACHER), everywhere)
    go_on = advances(student, teacher, STEPS)

    def advance(state: State | None, count: int) -> Trained:
        for leaf in jax.tree.leaves(state):
            assert leaf.ndim != 2 or len({str(shard.index) for shard in leaf.addressable_shards}) == 8
        return go_on(state, count)

    run_resumably(student, advance, STEPS, EVERY, folder, "m", say, shardings)


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
