"""Who computes the parts of a run: the devices of a process, and several processes that share the run's folder.

Processes meet through `jax.distributed`, learn their numbers, and leave it at once: parts need nothing of each
other, and its service aborts or holds up all processes when one dies. From then on they know of each other by
files in the run's folder, `.process-I.TOKEN.json`, which each rewrites every `TICK` seconds; every meeting draws
another token. A file that stays as it is for `SILENCE` looks belongs to a process that died.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import jax
from jax._src import distributed

from subliminal_theory.errors import InputError
from subliminal_theory.runs import Row, write_atomically

from .contract import Part

TICK = 0.5
# Looks at another process, one a tick: the heartbeat that never changes, and the one that never comes. They are
# counted, not timed: a process that was itself asleep does not take the others for dead.
SILENCE, ABSENCE = 40, 120
# Seconds until all processes have come to the meeting, and until all have seen its end.
MEETING, FAREWELL = 300, 5
_NAME = "run-worker"
T = TypeVar("T")


# --- what the command line says


@dataclass(frozen=True)
class Flags:
    """What a command line says of devices and processes."""

    devices: int | None = None
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    distributed: bool = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser the fields of `Flags`."""
    group = parser.add_argument_group(
        "devices and processes",
        "The parts of a run are shared out to the devices of this process, and to all\n"
        "processes that are started with the same settings and the same --out, a\n"
        "folder that all of them see.",
    )
    group.add_argument(
        "--devices", type=int, metavar="int", default=None, help="local devices to compute on (default all)"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", default=None, help="a free port of the machine of process 0"
    )
    group.add_argument("--processes", type=int, metavar="int", default=None, help="how many processes there are")
    group.add_argument(
        "--process", type=int, metavar="int", default=None, help="the number of this one: 0, 1, ..."
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        default=False,
        help="learn all three from Slurm, Open MPI, Kubernetes or a TPU pod",
    )


def take_flags(options: dict[str, Any]) -> Flags:
    """Remove the fields of `Flags` from parsed options and check what can be checked before a device is used.

    Raises:
        InputError: a flag is out of range, or some of those that belong together are missing.
    """
    flags = Flags(**{name: options.pop(name) for name in Flags.__dataclass_fields__})
    given = {
        "--coordinator": flags.coordinator,
        "--processes": flags.processes,
        "--process": flags.process,
    }
    missing = [name for name, value in given.items() if value is None]
    if flags.distributed and len(missing) < len(given):
        raise InputError(
            "--distributed finds out what --coordinator, --processes and --process say: leave them out"
        )
    if missing and len(missing) < len(given):
        raise InputError(f"--coordinator, --processes and --process go together: {', '.join(missing)} is missing")
    if flags.coordinator is not None and flags.processes is not None and flags.process is not None:
        _address(flags.coordinator)
        if flags.processes < 1:
            raise InputError(f"--processes must be at least 1, got {flags.processes}")
        if not 0 <= flags.process < flags.processes:
            raise InputError(f"--process must be from 0 to {flags.processes - 1}, got {flags.process}")
    return flags


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator takes HOST:PORT with a port from 1 to 65535, got {coordinator!r}")
    return host.strip("[]"), int(port)


def local_devices(count: int | None) -> list[jax.Device]:
    """The first `count` devices of this process, all of them if that is None.

    Raises:
        InputError: there are not so many.
    """
    found = jax.local_devices()
    if count is not None and not 1 <= count <= len(found):
        number = f"{len(found)} device{'s' if len(found) > 1 else ''} ({found[0].device_kind})"
        raise InputError(f"--devices {count} cannot be had: this process has {number}")
    return found[:count]


# --- the devices of one process


def compute(
    parts: Sequence[Part],
    devices: Sequence[jax.Device],
    save: Callable[[str, Sequence[Row], float], None],
    finished: Callable[[Part], None],
) -> None:
    """Compute and save parts, each on the next free devices; `finished` is called in this thread, part by part.

    After an exception in a part no further one is begun, those under way are completed, and it is raised here. An
    interrupt of this thread does not wait for them; call `leave` then.

    Raises:
        InputError: see `first_devices`.
    """
    devices = first_devices(parts, devices)
    if len(devices) == 1:
        for part in parts:
            _compute(part, devices[0], save)
            finished(part)
        return
    waiting, stop = iter(parts), threading.Event()
    lock = threading.Lock()
    outcomes: queue.SimpleQueue[Part | BaseException | None] = queue.SimpleQueue()

    def work(device: jax.Device) -> None:
        try:
            while not stop.is_set():
                with lock:
                    part = next(waiting, None)
                if part is None:
                    break
                _compute(part, device, save)
                outcomes.put(part)
        except BaseException as error:
            stop.set()
            outcomes.put(error)
        outcomes.put(None)

    for device in devices:
        threading.Thread(target=work, args=(device,), name=_NAME, daemon=True).start()
    working, failure = len(devices), None
    try:
        while working:
            outcome = outcomes.get()
            if outcome is None:
                working -= 1
            elif isinstance(outcome, BaseException):
                failure = failure or outcome
            else:
                finished(outcome)
    finally:
        stop.set()
    if failure is not None:
        raise failure


def first_devices(parts: Sequence[Part], devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """The first of the devices on which each of the parts that are computed at once is.

    Raises:
        InputError: a part takes more devices than there are.
    """
    wide = max((part.devices for part in parts), default=1)
    if wide > len(devices):
        raise InputError(f"each part of this run takes {wide} devices, and it may use {len(devices)}")
    return devices[: len(devices) // wide * wide : wide]


def _compute(part: Part, device: jax.Device, save: Callable[[str, Sequence[Row], float], None]) -> None:
    start = time.monotonic()
    with jax.default_device(device):
        rows = part.compute()
    save(part.name, rows, time.monotonic() - start)


def leave(status: int) -> NoReturn:
    """End this process with an exit status, also while other threads are inside a computation."""
    if any(thread.name == _NAME for thread in threading.enumerate()):
        # The interpreter would be taken down under their feet.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


# --- several processes


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which of them this one is."""

    process: int = 0
    processes: int = 1
    token: str = ""

    def share(self, waiting: Sequence[T]) -> list[T]:
        """What this process computes of the parts that all wait for."""
        return list(waiting[self.process :: self.processes])

    def name(self, process: int) -> str:
        """How messages call a process."""
        return f"process {process} of {self.processes}"


def meet(flags: Flags) -> Team:
    """Find the other processes; devices must not have been used before.

    Raises:
        InputError: they did not come in time, the address cannot be used, or nothing tells of other processes.
    """
    if flags.coordinator is None and not flags.distributed:
        return Team()
    # It would catch the signal by which schedulers end a process.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    keywords: dict[str, Any] = {}
    if flags.coordinator is not None:
        host, port = _address(flags.coordinator)
        loopback = host in ("localhost", "::1") or host.startswith("127.")
        if flags.process == 0:
            _require_free("" if not loopback else host, port, flags.coordinator)
        keywords = {
            "coordinator_address": flags.coordinator,
            "num_processes": flags.processes,
            "process_id": flags.process,
            # Without it the service listens on every address.
            "coordinator_bind_address": flags.coordinator if loopback else None,
        }

    def join() -> Team:
        # Past the patience of this process: when its own ends, it aborts.
        jax.distributed.initialize(**keywords, initialization_timeout=2 * MEETING)
        state = distributed.global_state
        assert state.client is not None
        if state.process_id == 0:
            state.client.key_value_set("token", secrets.token_hex(8))
        token = state.client.blocking_key_value_get("token", 1000 * MEETING)
        jax.distributed.shutdown()
        return Team(state.process_id, state.num_processes, token)

    where = f"at {flags.coordinator}" if flags.coordinator else "of this cluster"
    late = f"not all processes {where} came to meet within {MEETING} s: start all, each with its own --process"
    try:
        return _within(MEETING, join, late)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"the processes {where} cannot meet: {reason}") from error


def _require_free(host: str, port: int, coordinator: str) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--coordinator {coordinator} cannot be listened on: {reason}") from error


def _within(seconds: float, action: Callable[[], T], late: str) -> T:
    # In a thread of its own: compiled code that waits can be neither interrupted nor given up.
    outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((action(), None))
        except Exception as error:
            outcome.put((None, error))

    thread = threading.Thread(target=work, name=_NAME, daemon=True)
    thread.start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise InputError(late) from None
    thread.join()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@dataclass
class _Peer:
    file: Path
    seen: bytes | None = None
    silent: int = 0
    status: int | None = None
    line: str | None = None

    def look(self) -> None:
        """Read its file once more."""
        try:
            content = self.file.read_bytes()
            message = json.loads(content)
        except (OSError, ValueError):
            self.silent += 1
            return
        self.silent = 0 if content != self.seen else self.silent + 1
        self.seen, self.status, self.line = content, message["status"], message["line"]

    @property
    def dead(self) -> bool:
        return self.status is None and self.silent >= (ABSENCE if self.seen is None else SILENCE)

    @property
    def running(self) -> bool:
        return self.status is None and not self.dead and self.file.exists()


@dataclass
class Watch:
    """While entered, tells the other processes that this one lives, and ends it when one of them has ended.

    Leaving it tells the others how this process ended. One that died, or left with an exception, ends all others:
    with its exit status, 1 if it died, and a line that names it. Alone, a process watches nothing.
    """

    team: Team
    folder: Path
    _peers: dict[int, _Peer] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _beat: int = 0

    def __enter__(self) -> Self:
        if self.team.processes > 1:
            others = [process for process in range(self.team.processes) if process != self.team.process]
            self._peers = {process: _Peer(self._file(process)) for process in others}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write()
            except OSError as error:
                raise InputError(
                    f"cannot use output folder {self.folder}: {error.strerror}; choose another --out"
                ) from error
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        status, line = _ending(self.team.name(self.team.process), error)
        self._tell(status, line)
        if status != 0:
            self._part(FAREWELL)
        elif self.team.process == 0:
            # The others may just be writing down the time of their last part.
            self._part(SILENCE * TICK)

    def publish(self, settings: Mapping[str, Any], waiting: Sequence[str]) -> None:
        """Tell the other processes, from process 0, what is to be computed, in which settings."""
        if self._peers:
            content = json.dumps({"settings": settings, "waiting": list(waiting)})
            write_atomically(self._file("parts"), content.encode())

    def published(self, settings: Mapping[str, Any]) -> list[str]:
        """Wait for process 0 to say what is to be computed.

        Raises:
            InputError: it has other settings.
        """
        while True:
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(self._file("parts").read_bytes())
                break
            time.sleep(TICK)
        ours, others = json.loads(json.dumps(settings)), content["settings"]
        different = [name for name in {**ours, **others} if ours.get(name) != others.get(name)]
        if different:
            raise InputError(
                f"{', '.join(different)} must be the same as in process 0: start all with the same settings"
            )
        return content["waiting"]

    def wait(self) -> None:
        """Wait until process 0 has completed the run."""
        self._over.wait()

    def _file(self, process: int | str) -> Path:
        return self.folder / f".process-{process}.{self.team.token}.json"

    def _write(self, status: int | None = None, line: str | None = None) -> None:
        self._beat += 1
        content = {"beat": self._beat, "status": status, "line": line}
        self._file(self.team.process).write_bytes(json.dumps(content).encode())

    def _tell(self, status: int, line: str | None) -> None:
        with contextlib.suppress(OSError):
            self._write(status, line)

    def _watch(self) -> None:
        while not self._stop.wait(TICK):
            with contextlib.suppress(OSError):
                self._write()
            for process, peer in self._peers.items():
                peer.look()
                if peer.dead:
                    self._follow(1, self._obituary(process))
                elif peer.status:
                    self._follow(peer.status, peer.line or self._obituary(process))
                elif peer.status == 0 and process == 0:
                    self._over.set()

    def _obituary(self, process: int) -> str:
        name = self.team.name(process)
        if self._peers[process].seen is None:
            return f"{name} is not in {self.folder}: all need the same --out, on a shared file system"
        return f"{name} died; finished parts are kept, start all again with --resume"

    def _follow(self, status: int, line: str) -> None:
        self._tell(status, line)
        # A progress bar may have hidden the cursor.
        show = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        print(f"{show}error: {line}", file=sys.stderr, flush=True)
        self._part(FAREWELL)
        # The main thread may be inside a computation that lasts; what it has stored is whole.
        os._exit(status)

    def _part(self, seconds: float) -> None:
        """Wait until all know of the end; the last one clears up."""
        for _ in range(round(seconds / TICK)):
            for peer in self._peers.values():
                peer.look()
            if not any(peer.running for peer in self._peers.values()):
                break
            time.sleep(TICK)
        else:
            return
        for file in self.folder.glob(f".process-*.{self.team.token}.json"):
            file.unlink(missing_ok=True)


def _ending(name: str, error: BaseException | None) -> tuple[int, str | None]:
    if error is None:
        return 0, None
    if isinstance(error, KeyboardInterrupt):
        return 130, f"{name} was interrupted; finished parts are kept, start all again with --resume"
    reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return 2 if isinstance(error, InputError) else 1, f"{name} ended: {' '.join(reason.split())}"


def clear(folder: Path, team: Team) -> None:
    """Remove what processes of earlier runs left when all were killed."""
    for file in folder.glob(".process-*.json"):
        if not team.token or not file.name.endswith(f".{team.token}.json"):
            file.unlink(missing_ok=True)
