"""Who computes the parts of a run: the devices of a process, and all processes that share the run's folder.

Processes need no meeting and no number. Each takes the next part that is not stored and that no other has locked;
when a process dies, the system frees its lock, and another takes that part. So the same command with `--resume`,
started any number of times on machines that see the folder, shares out one run.
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

# Seconds between two looks at parts that other processes compute.
TICK = 0.5
_THREAD = "run-worker"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser the flag that says on which devices parts are computed."""
    parser.add_argument(
        "--devices",
        type=int,
        metavar="int",
        default=None,
        help="local devices that share out the parts of a run (default all); other processes share them too, "
        "if they are started with the same command and --resume",
    )


def local_devices(count: int | None) -> list[jax.Device]:
    """The first `count` devices of this process, all of them if that is None.

    Raises:
        InputError: there are fewer.
    """
    found = jax.local_devices()
    if count is not None and not 1 <= count <= len(found):
        number = f"{len(found)} device{'s' if len(found) > 1 else ''} ({found[0].device_kind})"
        raise InputError(f"--devices {count} cannot be had: this process has {number}")
    return found[:count]


def first_devices(parts: Sequence[Part], devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """The first device of each part that is computed at once.

    Raises:
        InputError: a part takes more devices than there are.
    """
    wide = max((part.devices for part in parts), default=1)
    if wide > len(devices):
        raise InputError(f"each part of this run takes {wide} devices, and it may use {len(devices)}")
    return devices[: len(devices) // wide * wide : wide]


@dataclass(frozen=True)
class Claims:
    """The parts of a run that are to be computed, shared out to threads and processes."""

    directory: RunDirectory
    waiting: list[Part]
    finished: Callable[[Part], None]
    stop: threading.Event
    lock: threading.Lock

    def __iter__(self) -> Iterator[tuple[Part, FileLock]]:
        """Parts that are this thread's, each locked until it is stored; waits for those of other processes."""
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
        """Compute and store parts on a device, until none is left."""
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
    """Compute and store parts, each on the next free devices; `finished` is called for each, wherever computed.

    After an exception in a part no further one is begun, those under way are completed, and it is raised here. An
    interrupt of this thread does not wait for them; call `leave` then.

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
    """End this process with an exit status, also while other threads are inside a computation."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        # An ordinary exit would take the interpreter down while these threads still run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
