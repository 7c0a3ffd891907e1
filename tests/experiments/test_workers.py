import contextlib
import json
import os
import re
import shutil
import signal
import socket
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
workers.TICK, workers.SILENCE, workers.ABSENCE = 0.1, int(os.environ.get("TOY_SILENCE", 40)), 60
workers.MEETING = 60
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


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


def together(count: int, *command: object) -> list[list[object]]:
    """The commands of several processes that meet on this machine."""
    meeting = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", count]
    return [[*command, *meeting, "--process", number] for number in range(count)]


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


def test_devices(tmp_path: Path, toy: list[object], whole: Path) -> None:
    out = tmp_path / "run"
    status, output, errors = run(*toy, "--pause", 0.1, "--out", out)
    assert (status, output.splitlines()[0], errors) == (0, "8 rows", "")
    assert same(out, whole)
    entries = log(tmp_path)
    assert {device for _, device, _ in entries} == {0, 1, 2, 3}
    assert sorted(seed for *_, seed in entries) == [*range(8)]
    assert json.loads((out / "provenance.json").read_text())["invocations"][0]["device"] == "4 x cpu"


@pytest.mark.parametrize("devices", [1, 4])
def test_error_in_a_part(devices: int, tmp_path: Path, toy: list[object]) -> None:
    out = tmp_path / "run"
    command = [*toy, "--devices", devices, "--seeds", 30, "--pause", 0.05, "--fault", "input", "--out", out]
    assert run(*command) == (2, "", "error: part 3 does not converge\n")
    stored = [path.name for path in sorted((out / "parts").iterdir())]
    assert {"seed-000.json", "seed-001.json", "seed-002.json"} <= {*stored}
    assert len(stored) <= 2 + devices
    assert sorted(f"seed-{seed:03d}.json" for *_, seed in log(tmp_path)) == stored


def test_bug_in_a_part(tmp_path: Path, toy: list[object]) -> None:
    status, output, errors = run(*toy, "--fault", "bug", "--out", tmp_path / "run")
    assert (status, output) == (1, "")
    assert errors.startswith("Traceback ")
    assert errors.endswith("\nZeroDivisionError: in part 3\n")


@NO_SIGKILL
def test_interrupt(tmp_path: Path, toy: list[object]) -> None:
    out = tmp_path / "run"
    with started([*toy, "--pause", 1000, "--out", out]) as (process,):
        wait_for((out / "parts").is_dir, process)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        expected = "interrupted: finished parts are kept, add --resume to go on\n"
        assert end(process, 10) == (130, "", expected)


def test_order_of_threads() -> None:
    """The third part fails while the first and second are computed: they are saved, the fourth is not begun."""
    saved, failed = [], threading.Event()

    def part(number: int) -> Part:
        def work() -> list[Any]:
            if number == 2:
                failed.set()
                raise InputError("third")
            assert failed.wait(10)
            return []

        return Part(str(number), 1, work)

    device = jax.local_devices()[0]
    counted: list[str] = []
    with pytest.raises(InputError, match="third"):
        workers.compute(
            [part(number) for number in range(9)],
            [device] * 3,
            lambda name, rows, seconds: saved.append(name),
            lambda part: counted.append(part.name),
        )
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--devices 0", "--devices 0 cannot be had: this process has {} device"),
        ("--devices -1", "--devices -1 cannot be had: this process has {} device"),
        ("--devices 99", "--devices 99 cannot be had: this process has {} device"),
        ("--devices x", "argument --devices: invalid int value: 'x'; see "),
        (
            "--processes 2",
            "--coordinator, --processes and --process go together: --coordinator, --process is missing",
        ),
        ("--process 0 --processes 2", "--coordinator, --processes and --process go together: --coordinator is "),
        ("--coordinator 127.0.0.1:1", "--coordinator, --processes and --process go together: --processes, --proc"),
        ("--coordinator 127.0.0.1:1 --processes 2 --process 2", "--process must be from 0 to 1, got 2"),
        ("--coordinator 127.0.0.1:1 --processes 2 --process -1", "--process must be from 0 to 1, got -1"),
        ("--coordinator 127.0.0.1:1 --processes 0 --process 0", "--processes must be at least 1, got 0"),
        (
            "--coordinator here --processes 2 --process 0",
            "--coordinator takes HOST:PORT with a port from 1 to 655",
        ),
        ("--coordinator a:70000 --processes 2 --process 0", "--coordinator takes HOST:PORT with a port from 1 to"),
        ("--distributed --process 1", "--distributed finds out what --coordinator, --processes and --process say"),
    ],
)
def test_refuses(arguments: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    given = refused(capsys, *arguments.split(), "--out", tmp_path / "run")
    assert given.startswith(message.format(jax.local_device_count()))
    assert not (tmp_path / "run").exists()


def test_refuses_a_taken_port(tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        meeting = ["--coordinator", address, "--processes", 2, "--process", 0]
        message = refused(capsys, *meeting, "--out", tmp_path / "run")
    assert message.startswith(f"--coordinator {address} cannot be listened on: ")


def test_distributed_without_a_cluster(tmp_path: Path, toy: list[object]) -> None:
    status, output, errors = run(*toy, "--distributed", "--out", tmp_path / "run")
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: the processes of this cluster cannot meet: ")


@pytest.mark.slow
def test_meeting_that_nobody_comes_to(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(TOY.replace("workers.MEETING = 60", "workers.MEETING = 2"))
    for command in together(2, script, "--out", tmp_path / "run"):
        status, output, errors = run(*command)
        assert (status, output, errors.count("\n")) == (2, "", 1)
        assert re.fullmatch(r"error: not all processes at 127\.0\.0\.1:\d+ came to meet within 2 s: .*\n", errors)


@pytest.mark.slow
@NO_SIGKILL
def test_interrupt_of_a_meeting(tmp_path: Path, toy: list[object]) -> None:
    for command in together(2, *toy, "--out", tmp_path / "run"):
        with started(command) as (process,):
            wait_for((tmp_path / f"log.{process.pid}").exists, process)
            time.sleep(3)
            process.send_signal(signal.SIGINT)
            assert end(process, 5)[0] == 130


# --- several processes


def test_processes(tmp_path: Path, toy: list[object], whole: Path) -> None:
    out = tmp_path / "run"
    with started(*together(3, *toy, "--pause", 0.1, "--devices", 2, "--out", out)) as processes:
        (zero, output, errors), *others = [end(process) for process in processes]
    assert (zero, output.splitlines()[0], errors) == (0, "8 rows", "")
    assert others == [(0, "", "")] * 2
    assert same(out, whole)
    computed = {(pid, seed) for pid, _, seed in log(tmp_path)}
    assert computed == {(processes[seed % 3].pid, seed) for seed in range(8)}
    (call,) = json.loads((out / "provenance.json").read_text())["invocations"]
    assert call["processes"] == 3
    assert not hidden(out)


@pytest.mark.slow
def test_refusal_of_process_0(tmp_path: Path, toy: list[object], whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    message = f"{out} already holds this run: add --resume to go on, or choose another --out"
    with started(*together(2, *toy, "--out", out)) as processes:
        zero, one = [end(process) for process in processes]
    assert zero == (2, "", f"error: {message}\n")
    assert one == (2, "", f"error: process 0 of 2 ended: {message}\n")
    assert not hidden(out)
    assert same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "count"), [("input", 2), ("bug", 3)])
def test_error_in_one_process(fault: str, count: int, tmp_path: Path, toy: list[object]) -> None:
    out = tmp_path / "run"
    # Part 3 is the second one of its process; the others would take minutes for theirs.
    long = ["--seeds", 300, "--pause", 1, "--devices", 1, "--fault", fault]
    with started(*together(count, *toy, *long, "--out", out)) as processes:
        ends = [end(process) for process in processes]
    failing = 3 % count
    status, output, errors = ends.pop(failing)
    if fault == "input":
        assert (status, output, errors) == (2, "", "error: part 3 does not converge\n")
        line = f"error: process {failing} of {count} ended: part 3 does not converge\n"
    else:
        assert (status, output, errors.splitlines()[-1]) == (1, "", "ZeroDivisionError: in part 3")
        line = f"error: process {failing} of {count} ended: ZeroDivisionError: in part 3\n"
    assert ends == [(status, "", line)] * (count - 1)
    assert (out / "parts" / f"seed-00{failing}.json").is_file()
    assert not hidden(out)


@pytest.mark.slow
def test_other_settings(tmp_path: Path, toy: list[object]) -> None:
    first, second = together(2, *toy, "--pause", 1, "--out", tmp_path / "run")
    with started(first, [*second, "--seeds", 9]) as processes:
        zero, one = [end(process) for process in processes]
    message = "seeds must be the same as in process 0: start all with the same settings"
    assert zero == (2, "", f"error: process 1 of 2 ended: {message}\n")
    assert one == (2, "", f"error: {message}\n")


@pytest.mark.slow
def test_other_folders(tmp_path: Path, toy: list[object]) -> None:
    first, second = together(2, *toy, "--out", tmp_path / "zero")
    with started(first, [*second, "--out", tmp_path / "one"]) as processes:
        zero, one = [end(process) for process in processes]
    for number, folder, (status, output, errors) in (1, "zero", zero), (0, "one", one):
        assert (status, output) == (1, "")
        advice = "all need the same --out, on a shared file system"
        assert errors == f"error: process {number} of 2 is not in {tmp_path / folder}: {advice}\n"


@pytest.mark.slow
@NO_SIGKILL
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process(
    victim: int, tmp_path: Path, toy: list[object], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_SILENCE", "20")
    out, slow = tmp_path / "run", ["--pause", 0.5, "--devices", 1]
    own = out / "parts" / f"seed-00{victim}.json"
    with started(*together(2, *toy, *slow, "--out", out)) as processes:
        wait_for(own.is_file, processes[victim])
        processes[victim].kill()
        status, output, errors = end(processes[1 - victim], 30)
    expected = f"error: process {victim} of 2 died; finished parts are kept, start all again with --resume\n"
    assert (status, output, errors) == (1, "", expected)
    assert not (out / "results.csv").exists()
    assert not [name for name in hidden(out) if not name.endswith(".tmp")]
    stored = {path.name for path in (out / "parts").glob("seed-*.json")}
    assert 0 < len(stored) < 8
    (tmp_path / "log").unlink()
    if victim:
        ends = [run(*toy, *slow, "--resume", "--out", out)]
    else:
        with started(*together(2, *toy, *slow, "--resume", "--out", out)) as processes:
            ends = [end(process) for process in processes]
    assert [status for status, *_ in ends] == [0] * len(ends)
    assert ends[0][2] == f"{len(stored)} of 8 parts are finished already\n"
    assert {f"seed-{seed:03d}.json" for *_, seed in log(tmp_path)} == {
        f"seed-{seed:03d}.json" for seed in range(8)
    } - stored
    assert same(out, whole)
    assert not hidden(out)


@pytest.mark.slow
@NO_SIGKILL
def test_interrupt_of_one_process(tmp_path: Path, toy: list[object]) -> None:
    out = tmp_path / "run"
    with started(*together(2, *toy, "--pause", 1000, "--out", out)) as processes:
        wait_for((out / "parts").is_dir, processes[0])
        time.sleep(1)
        processes[1].send_signal(signal.SIGINT)
        zero, one = [end(process, 20) for process in processes]
    assert one == (130, "", "interrupted: finished parts are kept, add --resume to go on\n")
    message = "process 1 of 2 was interrupted; finished parts are kept, start all again with --resume"
    assert zero == (130, "", f"error: {message}\n")
    assert not hidden(out)


def test_leftovers_of_processes_do_not_matter(tmp_path: Path) -> None:
    for name in (".process-1.00ff.json", ".process-parts.00ff.json"):
        (tmp_path / name).write_text("{}")
    RunDirectory.open(tmp_path, "toy", {}, resume=False, command="toy")
    workers.clear(tmp_path, workers.Team(0, 2, "00ff"))
    assert len(hidden(tmp_path)) == 2
    workers.clear(tmp_path, workers.Team())
    assert not hidden(tmp_path)
    assert (tmp_path / "config.json").is_file()


# --- the experiment that trains


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    command = ["-m", "experiments", *TRAINING, "--out"]
    assert run(*command, tmp_path / "one", "--devices", 1)[0] == 0
    assert run(*command, tmp_path / "four", "--devices", 4)[0] == 0
    with started(*together(2, *command, tmp_path / "two")) as processes:
        assert [end(process)[0] for process in processes] == [0, 0]
    one, *others = ((tmp_path / name / "results.csv").read_bytes() for name in ("one", "four", "two"))
    assert others == [one, one]


@pytest.mark.slow
@NO_SIGKILL
def test_killed_training(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    # The last --seeds counts.
    command = ["-m", "experiments", *TRAINING, "--seeds", 60, "--devices", 1, "--out"]
    assert run(*command, whole)[0] == 0
    with started(*together(2, *command, out)) as processes:
        wait_for((out / "parts" / "seeds-00001.json").is_file, processes[1])
        processes[1].kill()
        begin = time.monotonic()
        status, output, errors = end(processes[0])
    assert time.monotonic() - begin < 30
    assert (status, output) == (1, "")
    assert errors == "error: process 1 of 2 died; finished parts are kept, start all again with --resume\n"
    with started(*together(2, *command, out, "--resume")) as processes:
        assert [end(process)[0] for process in processes] == [0, 0]
    assert (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
