"""Image data sets: MNIST, any set of four idx files, and small digits that need no file and no network."""

import gzip
import hashlib
import math
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import platformdirs
from jaxtyping import UInt8
from rich.console import Console

from subliminal_theory.errors import InputError
from subliminal_theory.vision.download import Remote, fetch

_TRAIN_IMAGES = "train-images-idx3-ubyte"
_TRAIN_LABELS = "train-labels-idx1-ubyte"
_TEST_IMAGES = "t10k-images-idx3-ubyte"
_TEST_LABELS = "t10k-labels-idx1-ubyte"
_STEMS = (_TRAIN_IMAGES, _TRAIN_LABELS, _TEST_IMAGES, _TEST_LABELS)

MNIST = Remote(
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    sha256={
        _TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        _TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        _TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        _TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Gray images with one label each, as read-only arrays, and the SHA-256 of their data.

    Pixels run from 0 to `maximum`, and labels from 0 to `classes - 1`. `sha256` maps the name of each file,
    without its suffix, to the digest of its decompressed bytes. For the digits, it maps the name of each field to
    the digest of its bytes.
    """

    name: str
    train_images: UInt8[np.ndarray, "train height width"]
    train_labels: UInt8[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test height width"]
    test_labels: UInt8[np.ndarray, " test"]
    classes: int
    maximum: int
    sha256: dict[str, str]

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        _, height, width = self.train_images.shape
        return height, width

    def held_out(self) -> "ImageDataset":
        """Only the training images. Their last sixth is held out and replaces the test images."""
        kept = len(self.train_labels) - len(self.train_labels) // 6
        return replace(
            self,
            train_images=self.train_images[:kept],
            train_labels=self.train_labels[:kept],
            test_images=self.train_images[kept:],
            test_labels=self.train_labels[kept:],
        )


def load(name: str, data_dir: Path | None = None, *, progress: Console | None = None) -> ImageDataset:
    """Load "mnist", "digits", "auto" (MNIST, or the digits if MNIST is not available) or a folder of idx files.

    If `data_dir` is given, MNIST must be in it or in its folder `mnist`. Otherwise it is looked for in
    $SUBLIMINAL_DATA in the same way, and then in the user's cache folder; missing files are downloaded into the
    cache. The checksums of MNIST are always verified. The digits are scikit-learn's 1,797 images of 8 x 8 pixels.
    In each class, every fifth image (in the given order) is a test image. Download progress goes to `progress`,
    which defaults to standard error. If "auto" falls back to the digits, it says so and why there.

    Raises:
        InputError: the name is unknown, or files are missing, damaged, inconsistent with each other or cannot be
            downloaded.
    """
    cache = platformdirs.user_cache_path("subliminal_theory") / "mnist"
    return _load(name, data_dir, cache, MNIST, progress or Console(stderr=True))


def _load(name: str, data_dir: Path | None, cache: Path, remote: Remote, console: Console) -> ImageDataset:
    if name == "digits":
        return _digits()
    if name in ("mnist", "auto"):
        try:
            return _read("mnist", _mnist_files(data_dir, cache, remote, console), remote.sha256, classes=10)
        except InputError as error:
            if name == "mnist" or data_dir is not None:
                raise
            console.out(f"using the embedded 8 x 8 digits instead of MNIST: {error}", highlight=False)
            return _digits()
    if os.path.isdir(name):
        folder = Path(name)
        return _read(folder.resolve().name, _require(folder, _files(folder)))
    raise InputError(
        f"no data set or folder is called {name!r}: give mnist, digits, auto or the path of a folder that "
        "holds the four idx files"
    )


def _mnist_files(data_dir: Path | None, cache: Path, remote: Remote, console: Console) -> dict[str, Path]:
    if data_dir is not None:
        folder = max((data_dir, data_dir / "mnist"), key=lambda folder: len(_files(folder)))
        return _require(folder, _files(folder))
    if root := os.environ.get("SUBLIMINAL_DATA"):
        for folder in (Path(root), Path(root, "mnist")):
            if len(files := _files(folder)) == len(_STEMS):
                return files
    found = _files(cache)
    return {stem: found.get(stem) or fetch(remote, stem, cache, console) for stem in _STEMS}


def _digits() -> ImageDataset:
    from sklearn.datasets import load_digits  # imported here because it takes a second

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[4::5]] = True
    arrays = {
        "train_images": images[~test],
        "train_labels": labels[~test],
        "test_images": images[test],
        "test_labels": labels[test],
    }
    for array in arrays.values():
        array.flags.writeable = False
    sha256 = {field: hashlib.sha256(array.tobytes()).hexdigest() for field, array in arrays.items()}
    return ImageDataset(name="digits", **arrays, classes=10, maximum=16, sha256=sha256)


def _files(folder: Path) -> dict[str, Path]:
    """The idx files of a folder by stem. Each file may have any of its four common names."""
    names = [
        (stem, name + suffix)
        for stem in _STEMS for name in (stem.replace("-idx", ".idx"), stem) for suffix in ("", ".gz")
    ]  # fmt: skip
    return {stem: folder / name for stem, name in names if os.path.isfile(folder / name)}  # the last one wins


def _require(folder: Path, files: dict[str, Path]) -> dict[str, Path]:
    for stem in _STEMS:
        if stem not in files:
            raise InputError(
                f"{folder} does not hold {stem} or {stem}.gz: put the four idx files there, or name another folder"
            )
    return files


def _read(
    name: str, files: dict[str, Path], expected: dict[str, str] | None = None, classes: int | None = None
) -> ImageDataset:
    """Read and check the four files. `classes` defaults to one more than the largest training label."""
    arrays, sha256 = {}, {}
    for stem, path in files.items():
        data = _unpacked(path)
        arrays[stem] = parse_idx(data, str(path))
        sha256[stem] = hashlib.sha256(data).hexdigest()
        if expected is not None and sha256[stem] != expected[stem]:
            raise InputError(
                f"{path} is not the {stem} of {name} (SHA-256 {sha256[stem]}, expected {expected[stem]}): "
                "remove it and download it again"
            )
        if arrays[stem].ndim != (3 if "idx3" in stem else 1):
            raise InputError(f"{path} has {arrays[stem].ndim} dimensions: put {stem} in its place")
    alike = (_TRAIN_IMAGES, _TRAIN_LABELS, slice(1)), (_TEST_IMAGES, _TEST_LABELS, slice(1))
    for one, other, axes in (*alike, (_TEST_IMAGES, _TRAIN_IMAGES, slice(1, 3))):
        if arrays[one].shape[axes] != arrays[other].shape[axes]:
            raise InputError(
                f"{files[one]} has the shape {arrays[one].shape} but {files[other]} has {arrays[other].shape}: "
                "take both from one data set"
            )
    classes = classes or int(arrays[_TRAIN_LABELS].max()) + 1
    for stem in (_TRAIN_LABELS, _TEST_LABELS):
        if (largest := arrays[stem].max()) >= classes:
            raise InputError(
                f"{files[stem]} has a label {largest}, beyond the {classes} classes of {name}: "
                "replace it with the labels of this data set"
            )
    images, labels, test_images, test_labels = (arrays[stem] for stem in _STEMS)
    return ImageDataset(name, images, labels, test_images, test_labels, classes, 255, sha256)


def _unpacked(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot read {path} ({getattr(error, 'strerror', None) or error}): make it readable, download it "
            "again, or drop .gz from its name if it is already decompressed"
        ) from error


def parse_idx(data: bytes, where: str) -> UInt8[np.ndarray, "..."]:
    """Parse an idx file of unsigned bytes in one or three dimensions into a read-only view of `data`.

    `where` names the file in messages.

    Raises:
        InputError: `data` is not such a file, has missing or extra bytes, or has no elements.
    """
    if data[:4] not in (b"\x00\x00\x08\x01", b"\x00\x00\x08\x03"):
        raise InputError(
            f"{where} starts with 0x{data[:4].hex()} instead of 0x00000801 or 0x00000803: give an idx file "
            "of unsigned bytes in one or three dimensions"
        )
    dimensions = data[3]
    begin = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:begin].ljust(begin - 4, b"\0"))
    promised, held = math.prod(shape), len(data) - begin
    if promised != held:
        fault = "is cut short" if held < promised else "has extra bytes"
        raise InputError(f"{where} {fault}: its shape is {shape} and {held} bytes follow: download it again")
    if not promised:
        raise InputError(f"{where} has no elements, its shape is {shape}: give a file that has some")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)
