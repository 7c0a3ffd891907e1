"""Who computes the parts of a run: the devices of a process, and all processes that share the run's folder.

Processes need no coordinator and no rank. Each takes the next part that is neither stored nor locked by another
process. When a process dies, the operating system frees its lock, and another process takes the part. The same
command with `--resume` may therefore be started any number of times, on all machines that see the folder; they
share one run.
"""

import argparse
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import jax
from filelock import FileLock, Timeout

from subliminal_theory.errors import InputError
from subliminal_theory.runs import RunDirectory

from .contract import Part

# Seconds between checks of parts that other processes compute.
TICK = 0.5
_THREAD = "run-worker"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flag --devices to a parser."""
    parser.add_argument(
        "--devices",
        type=int,
        metavar="int",
        default=None,
        help="how many local devices compute the parts of a run (default all); other processes take parts too "
        "if they are started with the same command and --resume",
    )


def local_devices(count: int | None) -> list[jax.Device]:
    """The first `count` devices of this process, or all of them if `count` is None.

    Raises:
        InputError: there are fewer devices.
    """
    found = jax.local_devices()
    if count is not None and not 1 <= count <= len(found):
        number = f"{len(found)} device{'s' if len(found) > 1 else ''} ({found[0].device_kind})"
        raise InputError(f"--devices {count} is not possible: this process has {number}")
    return found[:count]


def first_devices(parts: Sequence[Part], devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """The first device of each part, for all parts that are computed at once.

    Raises:
        InputError: a part needs more devices than there are.
    """
    wide = max((part.devices for part in parts), default=1)
    if wide > len(devices):
        raise InputError(f"each part of this run takes {wide} devices, and it may use {len(devices)}")
    return devices[: len(devices) // wide * wide : wide]


@dataclass(frozen=True)
class Claims:
    """The parts of a run that are left to compute. Threads and processes share them."""

    directory: RunDirectory
    waiting: list[Part]
    finished: Callable[[Part], None]
    stop: threading.Event
    lock: threading.Lock

    def __iter__(self) -> Iterator[tuple[Part, FileLock]]:
        """The parts for this thread, each locked until it is stored. Waits for parts of other processes."""
        while not self.stop.is_set():
            with self.lock:
                claim = next(filter(None, map(self._claim, list(self.waiting))), None)
                if claim is None and not self.waiting:
                    return
            if claim is None:
                time.sleep(TICK)
            else:
                yield claim

    def _claim(self, part: Part) -> tuple[Part, FileLock] | None:
        own = FileLock(self.directory.path / "parts" / f".{part.name}.lock", thread_local=False)
        try:
            own.acquire(blocking=False)
        except Timeout:
            return None
        self.waiting.remove(part)
        if not self.directory.collect(part.name):
            return part, own
        _free(own)
        self.finished(part)
        return None

    def compute(self, device: jax.Device) -> None:
        """Compute and store parts on a device until none is left."""
        for part, own in self:
            try:
                start = time.monotonic()
                with jax.default_device(device):
                    rows = part.compute()
                self.directory.save(part.name, rows, time.monotonic() - start)
            finally:
                _free(own)
            self.finished(part)


def _free(claim: FileLock) -> None:
    with contextlib.suppress(OSError):
        os.unlink(claim.lock_file)
    claim.release()


def compute(
    directory: RunDirectory,
    parts: Sequence[Part],
    devices: Sequence[jax.Device],
    finished: Callable[[Part], None],
) -> None:
    """Compute and store parts, each on the next free devices.

    `finished` is called for every stored part, including parts that other processes compute. After an exception in
    a part, no new part starts, running parts finish, and the exception is raised here. An interrupt of this thread
    does not wait for running parts; call `leave` then.

    Raises:
        InputError: see `first_devices`.
    """
    devices = first_devices(parts, devices)
    stop, told = threading.Event(), queue.SimpleQueue[Part | BaseException | None]()
    if len(devices) == 1:
        Claims(directory, list(parts), finished, stop, threading.Lock()).compute(devices[0])
        return
    claims = Claims(directory, list(parts), told.put, stop, threading.Lock())

    def work(device: jax.Device) -> None:
        try:
            claims.compute(device)
        except BaseException as error:
            stop.set()
            told.put(error)
        told.put(None)

    for device in devices:
        threading.Thread(target=work, args=(device,), name=_THREAD, daemon=True).start()
    working, failure = len(devices), None
    try:
        while working:
            outcome = told.get()
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


def leave(status: int) -> NoReturn:
    """End this process with an exit status, even while other threads compute."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        # An ordinary exit would shut the interpreter down while these threads still run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
