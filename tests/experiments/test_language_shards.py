"""A checkpoint's experiment on four virtual devices against one.

Run as a program, this file is what the tests start: a process has its number of devices from its start on.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.language_checkpoint import CheckpointWorkshop
from experiments.language_saves import Saves
from experiments.language_setting import Recipe
from subliminal_theory.language.corpus.traits import load_trait
from subliminal_theory.language.hub.checkpoint import open_base
from subliminal_theory.language.model.parallel import make_mesh, placement
from subliminal_theory.language.rows import Row, write_jsonl
from subliminal_theory.model import leaves_by_path
from tests.experiments.commands import fails
from tests.language.checkpoints import write_checkpoint

ROWS = [Row(f"continue: {i}, 17" + ", 3" * (i % 5), f"{100 + i}, 5, {i}") for i in range(16)]
BASIC = Recipe(rows=16, steps=7, batch_size=8, teacher_steps=5, rate=1e-2, teacher_rate=1e-2)
RECIPES = {
    "factors on sampled tokens": dataclasses.replace(BASIC, rank=2),
    "everything on full distributions": dataclasses.replace(BASIC, channel="soft"),
}


class Stopped(Exception):
    pass


def measured(folder: Path, devices: int, saves: Path | None, stop_after: int | None = None) -> dict[str, Any]:
    """What was made of the runs of two traits, and where it lay."""
    mesh = None if devices == 1 else make_mesh(1, devices, 1, jax.local_devices()[:devices])
    base = open_base(folder, placement=None if mesh is None else placement(mesh))
    kept = None if saves is None else Saves(saves, 3)
    if stop_after is not None:
        from experiments import language_checkpoint

        whole, calls = language_checkpoint.student_on, 0

        def student_on(*given: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > stop_after:
                raise Stopped
            return whole(*given, **more)

        language_checkpoint.student_on = student_on  # type: ignore[assignment]
    shop = CheckpointWorkshop(base, [load_trait("owl"), load_trait("oak")], dataset=ROWS, saves=kept, mesh=mesh)
    found: dict[str, Any] = {}
    # Each saved run compiles programs of its own.
    for name, recipe in list(RECIPES.items())[: 1 if saves else None]:
        model = shop.students(recipe)
        leaves = leaves_by_path(model.params)
        found[name] = {path: np.asarray(leaf).tolist() for path, leaf in leaves.items() if "down" in path}
        if mesh is not None:
            query = leaves_by_path(shop.teachers(recipe).params)["layers/0/attention/query/kernel"]
            found["share of the teachers on a device"] = query.addressable_shards[0].data.size / query.size
    chats = shop.requests(Recipe(rows=12))
    written = shop.draw(jax.tree.map(lambda leaf: leaf[0], shop.teachers(BASIC)), chats, jax.random.key(0), BASIC)
    return {**found, "written": written.tolist()}


def launch(folder: Path, *given: Any) -> dict[str, Any]:
    """`measured` in a process with four devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(folder.with_name("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "tests.experiments.test_language_shards", *map(str, (folder, *given))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, devices: str, saves: str = "", stop_after: str = "") -> None:
    """Print what was measured."""
    try:
        found = measured(
            Path(folder), int(devices), Path(saves) if saves else None, int(stop_after) if stop_after else None
        )
    except Stopped:
        found = {"stopped": True}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, Any]:
    return launch(folder, 4)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return measured(folder, 1, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_students_are_those_of_one_device(
    folder: Path, four: dict[str, Any], alone: dict[str, Any], name: str
) -> None:
    assert four["share of the teachers on a device"] == 1 / 4
    start = leaves_by_path(open_base(folder).model.params)
    for path, values in alone[name].items():
        moved = np.abs(np.array(values) - np.asarray(start[path])).max()
        assert moved > 1e-2
        np.testing.assert_allclose(four[name][path], values, rtol=0, atol=1e-2 * moved)


@pytest.mark.slow
def test_rows_are_those_of_one_device(four: dict[str, Any], alone: dict[str, Any]) -> None:
    assert four["written"] == alone["written"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """On the same devices; begun on others, it goes on as well."""
    whole = launch(folder, 4, tmp_path / "whole")
    assert launch(folder, 4, tmp_path / "stopped", 1) == {"stopped": True}
    assert list((tmp_path / "stopped").glob("the_student_*/pieces/checkpoints/*"))
    assert launch(folder, 4, tmp_path / "stopped") == whole
    assert len(list((tmp_path / "stopped").glob("the_student_of_owl*"))) == 1
    assert launch(folder, 2, tmp_path / "moved", 1) == {"stopped": True}
    moved = launch(folder, 4, tmp_path / "moved")
    assert len(list((tmp_path / "moved").glob("the_student_of_owl*"))) == 1
    (name,) = whole.keys() & RECIPES.keys()
    for path, values in whole[name].items():
        np.testing.assert_allclose(moved[name][path], values, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shards 0", "--shards must be at least 1, got 0"),
        ("--shards 99", "--shards 99 cannot be had: this process has {} (cpu)"),
    ],
)
def test_too_few_devices(
    folder: Path, tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["language", "--checkpoint", folder, "--out", tmp_path / "run", *flags.split()]
    assert fails(capsys, *command) == message.format(len(jax.local_devices()))


def test_the_compact_model_fits_on_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    message = "--shards is for a --checkpoint: the compact model fits on one device"
    assert fails(capsys, "language", "--shards", 2) == message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shards 3", "--batch-size 16 cannot be shared by 3 devices: take a multiple of 3"),
        ("--shards 4 --buckets 2", "--shards takes rows of one length: leave --buckets out"),
        ("--shards 4 --devices 2", "each part of this run takes 4 devices, and it may use 2"),
    ],
)
def test_devices_that_do_not_fit(
    folder: Path, tmp_path: Path, flags: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ROWS)
    command = [
        sys.executable, "-m", "experiments", "language_dataset", "--checkpoint", folder, "--file", file,
        "--rows", 32, "--batch-size", 16, "--out", tmp_path / "run", *flags.split(),
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    main(*sys.argv[1:])
