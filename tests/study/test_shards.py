"""A checkpoint's study on four virtual devices against one.

Run as a program, this file is what the tests start: a process has its number of devices from its start on.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.language.hub.checkpoint import open_base
from subliminal_theory.model import leaves_by_path
from subliminal_theory.parallel import make_mesh, placement
from subliminal_theory.study import LowRank, Store, Study, Written, reading, store
from subliminal_theory.study.reading import model_of_run
from tests.language.checkpoints import write_checkpoint
from tests.study.speakers import ROWS, SOFT, TEACHER, checkpoint, student

LONG = replace(TEACHER, steps=5, optimizer=replace(TEACHER.optimizer, rate=jnp.float32(1e-2)))
STUDENTS = {
    "factors on sampled tokens": student(text=ROWS, rows=16, steps=7, rate=1e-2, trains=LowRank(2)),
    "everything on full distributions": student(SOFT, ROWS, rows=16, steps=7, rate=1e-2),
}


class Stopped(Exception):
    pass


def measured(folder: Path, devices: int, saves: Path | None, stop_after: int | None = None) -> dict[str, Any]:
    """What was made of the runs of two traits, and where it lay."""
    mesh = None if devices == 1 else make_mesh(1, devices, 1, jax.local_devices()[:devices])
    base = open_base(folder, placement=None if mesh is None else placement(mesh))
    world = checkpoint(base, store=None if saves is None else Store(saves, 3), mesh=mesh)
    study, found = Study(world), dict[str, Any]()
    teacher = study.teacher(LONG)
    if mesh is not None:
        query = leaves_by_path(teacher.params)["layers/*/attention/query/kernel"]
        found["share of the teachers on a device"] = query.addressable_shards[0].data.size / query.size
    if stop_after is not None:
        whole, left = store._advance, stop_after

        def advance(*given: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped
            return whole(*given, **more)

        store._advance = advance
    # Each saved run compiles programs of its own.
    for name, one in list(STUDENTS.items())[: 1 if saves else None]:
        ((_, finished),) = study.distil(LONG, {name: one})
        leaves = leaves_by_path(finished.model.params)
        found[name] = {
            path: np.asarray(leaf).tolist()
            for path, leaf in leaves.items()
            if "down" in path and not path.endswith("/a")
        }
    text = Written(12)
    written = reading.draw(world, model_of_run(teacher, 0), world.requests(text), jax.random.key(0), text)
    return {**found, "written": np.concatenate([*written]).tolist()}


def launch(folder: Path, *given: Any) -> dict[str, Any]:
    """`measured` in a process with four devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(folder.with_name("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "tests.study.test_shards", *map(str, (folder, *given))]
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
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1)


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, Any]:
    return launch(folder, 4)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return measured(folder, 1, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_students_are_those_of_one_device(
    folder: Path, four: dict[str, Any], alone: dict[str, Any], name: str
) -> None:
    assert four["share of the teachers on a device"] == 1 / 4
    start = leaves_by_path(open_base(folder).model.params)
    for path, values in alone[name].items():
        moved = np.abs(np.array(values) - np.asarray(start.get(path, 0.0))).max()
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
    assert list((tmp_path / "stopped").glob("the_student_*/saves/step-*"))
    assert launch(folder, 4, tmp_path / "stopped") == whole
    assert len(list((tmp_path / "stopped").glob("the_student_of_owl*"))) == 1
    assert launch(folder, 2, tmp_path / "moved", 1) == {"stopped": True}
    moved = launch(folder, 4, tmp_path / "moved")
    assert len(list((tmp_path / "moved").glob("the_student_of_owl*"))) == 1
    (name,) = whole.keys() & STUDENTS.keys()
    for path, values in whole[name].items():
        np.testing.assert_allclose(moved[name][path], values, rtol=0, atol=1e-3)


if __name__ == "__main__":
    main(*sys.argv[1:])
