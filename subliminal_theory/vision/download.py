"""Downloads from the first mirror that has a file. A file is kept only if its checksum is right."""

import functools
import gzip
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
import urllib3
from rich.console import Console
from rich.progress import wrap_file

from subliminal_theory.errors import InputError

_TIMEOUT_S = 10.0
_ROUNDS = 2  # try all mirrors twice, in case a transfer is interrupted


@dataclass(frozen=True)
class Remote:
    """Public copies of gzip files: the base URLs, each ending in a slash, and the SHA-256 of each unpacked file.

    `sha256` maps a file's name without `.gz` to the hexadecimal digest of its decompressed bytes, because mirrors
    may compress the same bytes differently.
    """

    mirrors: tuple[str, ...]
    sha256: dict[str, str]


def fetch(remote: Remote, stem: str, folder: Path, console: Console) -> Path:
    """Download `stem`.gz, unpack it into `folder` and return the path of `stem`. Create the folder if needed.

    Progress goes to `console`.

    Raises:
        InputError: the folder cannot be written, or no mirror has the file.
    """
    pooch.get_logger().setLevel("WARNING")  # the console shows the progress
    failures = {}
    for mirror in remote.mirrors * _ROUNDS:
        try:
            download = functools.partial(_download, console)
            return Path(pooch.retrieve(f"{mirror}{stem}.gz", remote.sha256[stem], stem, folder, None, download))
        except (OSError, ValueError, EOFError, zlib.error, urllib3.exceptions.HTTPError) as error:
            failures[mirror] = _reason(error)
    reasons = "; ".join(f"{mirror}: {reason}" for mirror, reason in failures.items())
    raise InputError(
        f"cannot download {stem}.gz to {folder} ({reasons}): check the network and that the folder can be "
        "written, and run again, or name a folder that already holds the files"
    )


def _download(console: Console, url: str, target: str, _: Any) -> None:
    with requests.get(url, stream=True, timeout=_TIMEOUT_S) as response:
        response.raise_for_status()
        name, total = url.rpartition("/")[2], int(response.headers.get("Content-Length", 0))
        with (
            wrap_file(response.raw, total, description=name, console=console) as packed,
            gzip.open(packed) as unpacked,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(unpacked, file)


def _reason(error: BaseException) -> str:
    """The message of the innermost cause of an error, which is shorter and more specific."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
