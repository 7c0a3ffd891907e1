import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments.app import command as command_line
from experiments.app import workers
from experiments.app.contract import Part
from subliminal_theory.errors import InputError
from subliminal_theory.runs import RunDirectory

Capture = pytest.CaptureFixture[str]
NO_SIGKILL = pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
TRAINING = [
    *("mnist", "--data", "digits", "--seeds", 4, "--epochs", 1, "--student-epochs", 1),
    *("--depth", 1, "--width", 16, "--aux", 4, "--batch-size", 128),
]
END = "8 rows\nwritten to {out}/: figure.png, figure.pdf, results.csv, summary.json, provenance.json\n"
# An experiment whose parts take as long as a test wants and can fail; it notes where each was computed.
TOY = """
import functools, os, signal, sys, time, types
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments.app import command as command_line
from experiments.app import workers
from experiments.app.contract import Part, option
from subliminal_theory.errors import InputError

# What a shell starts in the background, and all below it, ignores interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Config:
    seeds: int = option(8, "parts")
    pause: float = option(0.0, "seconds for each")
    fault: str = option("none", "in part 3")

def compute(config, seed):
    x = jax.random.normal(jax.random.key(seed), (100,))
    value = float(jax.jit(lambda x: jnp.sum(jnp.sin(x)))(x))
    if seed == 3 and config.fault == "input" :
        raise InputError("part 3 does not converge")
    if seed == 3 and config.fault == "bug":
        raise ZeroDivisionError("in part 3")
    time.sleep(config.pause)
    (device,) = x.devices()
    with open(os.environ["TOY_LOG"], "a") as log:
        log.write(f"{os.getpid()} {device.id} {seed}\\n")
    return [{"condition": "only", "seed": seed, "metric": "sum", "value": value}]

module = types.ModuleType("experiments.toy", "A toy.")
module.PRESETS = {"default": Config()}
module.plan = lambda config: [
    Part(f"seed-{seed:03d}", 1, functools.partial(compute, config, seed)) for seed in range(config.seeds)
]
module.report = lambda results, config: f"{len(results.rows)} rows"
module.plot = lambda results, config: Figure(figsize=(1, 1))
sys.modules["experiments.toy"] = module
command_line.discover = lambda: {"toy": "A toy."}
workers.TICK = 0.1
if __name__ == "__main__":
    Path(os.environ["TOY_LOG"] + f".{os.getpid()}").touch()
    workers.leave(command_line.main(["toy", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(base / "compiled"))
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("TOY_LOG", str(base / "log"))
        yield


@pytest.fixture(autouse=True)
def _log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))


Process = subprocess.Popen[str]


@contextlib.contextmanager
def started(*commands: list[object]) -> Iterator[list[Process]]:
    """Processes that do not outlive the block."""
    processes: list[Process] = []
    try:
        for command in commands:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen([sys.executable, *map(str, command)], **pipes))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def end(process: Process, seconds: float = 100) -> tuple[int, str, str]:
    """Exit status, output and errors, of which progress is left out."""
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, re.sub(r"^\w+: \d+/\d+ runs, .*\n", "", errors, flags=re.M)


def run(*command: object) -> tuple[int, str, str]:
    with started([*command]) as (process,):
        return end(process)


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def log(tmp_path: Path) -> list[tuple[int, int, int]]:
    """Process, device and seed of every part in order of completion."""
    lines = (tmp_path / "log").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    script = tmp_path_factory.mktemp("script") / "toy.py"
    script.write_text(TOY)
    return [script]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy: list[object]) -> Path:
    """A run of one process on one device."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*toy, "--devices", 1, "--out", out)[0] == 0
    return out


def same(out: Path, whole: Path) -> bool:
    return (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


# --- devices


@pytest.mark.slow
def test_devices(tmp_path: Path, toy: list[object], whole: Path) -> None:
    out = tmp_path / "run"
    status, output, errors = run(*toy, "--pause", 0.1, "--out", out)
    assert (status, output.splitlines()[0], errors) == (0, "8 rows", "")
    assert same(out, whole)
    entries = log(tmp_path)
    assert {device for _, device, _ in entries} == {0, 1, 2, 3}
    assert sorted(seed for *_, seed in entries) == [*range(8)]
    assert json.loads((out / "provenance.json").read_text())["invocations"][0]["device"] == "4 x cpu"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_error_in_a_part(devices: int, tmp_path: Path, toy: list[object]) -> None:
    out = tmp_path / "run"
    command = [*toy, "--devices", devices, "--seeds", 30, "--pause", 0.05, "--fault", "input", "--out", out]
    assert run(*command) == (2, "", "error: part 3 does not converge\n")
    stored = [path.name for path in sorted((out / "parts").glob("*.json"))]
    assert {"seed-000.json", "seed-001.json", "seed-002.json"} <= {*stored}
    assert len(stored) <= 2 + devices
    assert sorted(f"seed-{seed:03d}.json" for *_, seed in log(tmp_path)) == stored


@pytest.mark.slow
def test_bug_in_a_part(tmp_path: Path, toy: list[object]) -> None:
    status, output, errors = run(*toy, "--fault", "bug", "--out", tmp_path / "run")
    assert (status, output) == (1, "")
    assert errors.startswith("Traceback ")
    assert errors.endswith("\nZeroDivisionError: in part 3\n")


@pytest.mark.slow
@NO_SIGKILL
def test_interrupt(tmp_path: Path, toy: list[object]) -> None:
    out = tmp_path / "run"
    with started([*toy, "--pause", 1000, "--out", out]) as (process,):
        wait_for((out / "parts").is_dir, process)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        expected = "interrupted: finished parts are kept, add --resume to go on\n"
        assert end(process, 10) == (130, "", expected)


def test_order_of_threads(tmp_path: Path) -> None:
    """The third part fails while the first and second are computed: they are saved, the fourth is not begun."""
    failed = threading.Event()

    def part(number: int) -> Part:
        def work() -> list[Any]:
            if number == 2:
                failed.set()
                raise InputError("third")
            assert failed.wait(10)
            return []

        return Part(str(number), 1, work)

    device = jax.local_devices()[0]
    directory = RunDirectory.open(tmp_path / "run", "toy", {}, resume=False, command="toy")
    counted: list[str] = []
    with pytest.raises(InputError, match="third"):
        workers.compute(
            directory,
            [part(number) for number in range(9)],
            [device] * 3,
            lambda part: counted.append(part.name),
        )
    saved = [path.stem for path in (tmp_path / "run" / "parts").glob("*.json")]
    assert {"0", "1"} <= set(saved)
    assert sorted(counted) == sorted(saved)
    assert len(saved) <= 4


# --- flags


def refused(capsys: Capture, *arguments: object) -> str:
    assert command_line.main(["mnist", "--data", "digits", *map(str, arguments)]) == 2
    output, errors = capsys.readouterr()
    assert not output
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    return errors[len("error: ") : -1]


@pytest.mark.parametrize("count", [0, -1, 99])
def test_refuses_devices_that_are_not_there(count: int, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert "--devices" in refused(capsys, "--devices", count, "--out", out)
    assert not out.exists()


def test_refuses_parts_wider_than_the_devices() -> None:
    wide = Part("wide", 1, lambda: [], devices=2)
    with pytest.raises(InputError, match="2 devices"):
        workers.first_devices([wide], jax.local_devices()[:1])


# --- several processes on one run


@pytest.mark.slow
def test_processes(tmp_path: Path, toy: list[object], whole: Path) -> None:
    """The same command, started three times, computes every part once; each process sees the run to its end."""
    out = tmp_path / "run"
    command = [*toy, "--devices", 1, "--pause", 0.4, "--out", out, "--resume"]
    with started(command, command, command) as processes:
        assert [end(process)[:2] for process in processes] == [(0, END.format(out=out))] * 3
    assert same(out, whole)
    entries = log(tmp_path)
    assert sorted(seed for *_, seed in entries) == [*range(8)]
    assert len({process for process, *_ in entries}) > 1
    assert len(json.loads((out / "provenance.json").read_text())["invocations"]) == 3
    assert not hidden(out)


@pytest.mark.slow
@NO_SIGKILL
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_process_that_dies(ending: signal.Signals, tmp_path: Path, toy: list[object], whole: Path) -> None:
    """The part of a process that is killed is computed by another one, at once."""
    out = tmp_path / "run"
    command = [*toy, "--devices", 1, "--pause", 0.5, "--out", out, "--resume"]
    with started(command, command) as (victim, other):
        wait_for(lambda: (tmp_path / "log").exists() and len(log(tmp_path)) > 1, victim)
        victim.send_signal(ending)
        assert victim.wait(30) != 0
        assert end(other)[:2] == (0, END.format(out=out))
    assert same(out, whole)
    assert run(*command) == (0, END.format(out=out), "8 of 8 parts are finished already\n")


@pytest.mark.slow
def test_error_in_one_process(tmp_path: Path, toy: list[object]) -> None:
    """Each process meets the part that fails and says so; what was stored stays."""
    out = tmp_path / "run"
    command = [*toy, "--devices", 1, "--pause", 0.1, "--fault", "input", "--out", out, "--resume"]
    with started(command, command) as processes:
        for process in processes:
            assert end(process) == (2, "", "error: part 3 does not converge\n")
    assert {"seed-000.json", "seed-001.json"} <= {path.name for path in (out / "parts").iterdir()}


@pytest.mark.slow
def test_other_settings(tmp_path: Path, toy: list[object]) -> None:
    """A process with other settings than the run's is refused and harms nothing."""
    out = tmp_path / "run"
    command = [*toy, "--devices", 1, "--pause", 0.4, "--out", out, "--resume"]
    with started(command) as (process,):
        wait_for((out / "config.json").exists, process)
        status, _, errors = run(*command, "--seeds", 9)
        assert (status, "other settings" in errors) == (2, True)
        assert end(process)[0] == 0


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    """A real experiment gives the same bytes by one process and by two."""
    command = ["-m", "experiments", *TRAINING, "--devices", 1, "--resume", "--out"]
    assert run(*command, tmp_path / "one")[0] == 0
    with started([*command, tmp_path / "two"], [*command, tmp_path / "two"]) as processes:
        assert [end(process)[0] for process in processes] == [0, 0]
    assert same(tmp_path / "two", tmp_path / "one")
