"""Downloads that resume, from the first mirror that answers, kept only when their checksum is right."""

import gzip
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from subliminal_theory.errors import InputError

_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Remote:
    """Public copies of gzip files: base addresses ending in a slash, and the SHA-256 of each file unpacked.

    `sha256` maps a file's name without `.gz` to the hexadecimal digest of its decompressed bytes, because
    mirrors may have compressed the same bytes differently.
    """

    mirrors: tuple[str, ...]
    sha256: dict[str, str]


class _MirrorError(Exception):
    """A mirror failed; another may not."""


def fetch(remote: Remote, stem: str, folder: Path, console: Console) -> Path:
    """Download `stem`.gz into a folder, which is made where needed, and return its path.

    Bytes gather in `stem`.gz.part, from which a later call resumes, and take the final name once verified.
    Progress goes to `console`. Raises InputError if the folder cannot be written or no mirror has the file.
    """
    target = folder / f"{stem}.gz"
    part = folder / f"{stem}.gz.part"
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for mirror in remote.mirrors:
            try:
                _complete(mirror + target.name, part, remote.sha256[stem], console)
            except _MirrorError as error:
                failures.append(f"{mirror}: {error}")
            else:
                os.replace(part, target)
                return target
    except OSError as error:
        raise InputError(
            f"cannot write downloads to {folder} ({error.strerror}): make it writable, or name a folder that "
            "already holds the files"
        ) from error
    raise InputError(
        f"cannot download {target.name} to {folder} ({'; '.join(failures)}): check the network and run "
        "again, or name a folder that already holds the files"
    )


def _complete(url: str, part: Path, sha256: str, console: Console) -> None:
    restarted = False
    while True:
        before = _size(part)
        try:
            start = _transfer(url, part, console)
        except _MirrorError:
            if _size(part) > before:
                continue
            raise
        if _unpacked_sha256(part) == sha256:
            return
        part.unlink()
        # What an earlier transfer left, from another mirror or of an older file, may be what is wrong: only
        # a mirror that sent everything at once is to blame.
        if start == 0 or restarted:
            raise _MirrorError("what it sends has another checksum")
        restarted = True


def _transfer(url: str, part: Path, console: Console) -> int:
    """Append the rest of a file to `part` and return the offset, in bytes, from which the mirror sent it."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and start:  # nothing follows what is there: complete, or not this file
                return start
            raise _MirrorError(f"HTTP status {error.code}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _MirrorError(_reason(error)) from error
    with response:
        if response.status != 206:  # the whole file, whatever was asked for
            start = 0
        total = None if response.length is None else start + response.length
        name = part.name.removesuffix(".part")
        with open(part, "ab" if start else "wb") as file, _progress(name, start, total, console) as show:
            received = start
            while chunk := _read(response):
                file.write(chunk)
                received += len(chunk)
                show(received)
    if total is not None and received < total:
        raise _MirrorError(f"the transfer was cut after {received} of {total} bytes")
    return start


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _MirrorError(f"the transfer was cut ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unpacked_sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return None
    return digest.hexdigest()


@contextmanager
def _progress(name: str, start: int, total: int | None, console: Console) -> Iterator[Callable[[int], None]]:
    if not console.is_terminal:
        yield _plain_progress(name, start, total, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=start)
        yield lambda received: bar.update(task, completed=received)


def _plain_progress(name: str, start: int, total: int | None, console: Console) -> Callable[[int], None]:
    """One line for every tenth of the file, or for every 10 MB where its length is not known."""
    step = max(total / 10, 1) if total else 1e7
    began = time.monotonic()
    shown = int(start / step)

    def show(received: int) -> None:
        nonlocal shown
        if int(received / step) == shown:
            return
        shown = int(received / step)
        rate = (received - start) / max(time.monotonic() - began, 1e-6)
        line = f"{received / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        if total:
            line = f"{received / total:.0%} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, "
            line += f"{(total - received) / rate:.0f} s left"
        console.out(f"{name}: {line}", highlight=False)

    return show
