"""Reads GGUF files, in which llama.cpp and other programs keep a whole model: metadata and tensors.

The library `gguf` knows the types, and converts blocks of every quantization to floats. Its own reader makes an
array for each token of the vocabulary, which takes seconds. So this module reads the header itself.
"""

import contextlib
import functools
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from subliminal_theory.errors import InputError, one_line, shown
from subliminal_theory.language.hub.tensors import release

SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_FORMATS = {
    GGUFValueType.UINT8: "u1", GGUFValueType.INT8: "i1", GGUFValueType.UINT16: "u2", GGUFValueType.INT16: "i2",
    GGUFValueType.UINT32: "u4", GGUFValueType.INT32: "i4", GGUFValueType.FLOAT32: "f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "u8", GGUFValueType.INT64: "i8", GGUFValueType.FLOAT64: "f8",
}  # fmt: skip
_FLOATS = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as stored in a file: a read-only view of the mapped bytes. Outputs are its first axis."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `floats`."""
        return _FLOATS.get(self.kind, np.dtype(np.float32))

    def floats(self) -> np.ndarray:
        """The tensor as floats: a view if the file stores floats, otherwise a new array."""
        if self.kind in _FLOATS:
            return self.data.view(self.dtype).reshape(self.shape)
        *outer, inputs = self.shape
        found = dequantize(self.data.reshape(*outer, -1), self.kind).reshape(*outer, inputs)
        release(self.data)
        return found


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An open file: its metadata by key (arrays of numbers are NumPy arrays), and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def is_gguf(path: Path) -> bool:
    """Whether a path ends in .gguf and is not a folder."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def read_gguf(path: Path) -> GgufFile:
    """The file at a path. The last two files are cached until they change on disk.

    Raises:
        InputError: the file cannot be read, is cut off or damaged, has an unknown version, is big-endian, or is
            one of several parts; a tensor has a type that cannot be converted to floats. The message names the
            fault.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give a GGUF file") from error
    return _read(path, found.st_mtime_ns, found.st_size)


@contextlib.contextmanager
def types_checked(path: Path) -> Iterator[None]:
    """Turn errors from metadata of the wrong type into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{path} has metadata of the wrong type ({one_line(error)}): download it again"
        ) from error


@functools.lru_cache(maxsize=2)
def _read(path: Path, changed: int, size: int) -> GgufFile:
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): download it again") from error
    with types_checked(path):
        return _parsed(path, data)


def _parsed(path: Path, data: np.ndarray) -> GgufFile:
    _require_version(path, data[:8].tobytes())
    header = _Header(path, data)
    try:
        tensors, pairs = header.number("u8"), header.number("u8")
        metadata = dict(header.pair() for _ in range(pairs))
        infos = [header.info() for _ in range(tensors)]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is damaged (a name is not text: {one_line(error)}): download it again"
        ) from error
    if len(metadata) < pairs or len({name for name, *_ in infos}) < tensors:
        raise InputError(f"{path} is damaged (a name occurs twice): download it again")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise InputError(f"{path} is one of {shown(parts)} parts: merge them into one file")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise InputError(f"{path} is damaged (general.alignment is {shown(alignment)}): download it again")
    begin = -(-header.place // alignment) * alignment
    stored = {name: _stored(path, data, begin + offset, name, kind, dims) for name, kind, dims, offset in infos}
    return GgufFile(path, MappingProxyType(metadata), MappingProxyType(stored))


def _require_version(path: Path, begin: bytes) -> None:
    if begin.startswith(b"version "):
        raise InputError(f"{path} is a pointer of Git LFS: download the file that it names")
    if len(begin) < 8 or begin[:4] != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: give one, or a folder of weights")
    version = struct.unpack("<I", begin[4:])[0]
    if version & 0xFFFF == 0:
        raise InputError(f"{path} is a big-endian file: convert it for little-endian machines")
    if version not in _VERSIONS:
        known = " and ".join(map(str, _VERSIONS))
        raise InputError(f"{path} has GGUF version {version}, only {known} can be read: convert it again")


class _Header:
    """Reads the header of a file from its beginning. Raises InputError if it ends too early."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.place = path, data, 8

    def take(self, count: int) -> np.ndarray:
        """The next bytes."""
        end = self.place + count
        if end > len(self.data):
            raise InputError(f"{self.path} is cut off within its header: download it again")
        found, self.place = self.data[self.place : end], end
        return found

    def number(self, dtype: str) -> Any:
        """A Python number. A float32 becomes the shortest decimal that rounds to it."""
        value = np.frombuffer(self.take(np.dtype(dtype).itemsize), f"<{dtype}" if dtype != "?" else dtype)[0]
        return float(str(value)) if dtype == "f4" else value.item()

    def text(self) -> str:
        """A UTF-8 text."""
        return self.take(self.number("u8")).tobytes().decode()

    def pair(self) -> tuple[str, Any]:
        """A key and its value."""
        key = self.text()
        return key, self.value(key, self.number("u4"))

    def value(self, key: str, kind: int) -> Any:
        """A value of this kind."""
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self._array(key, self.number("u4"), self.number("u8"))
        return self.number(self._format(key, kind))

    def _array(self, key: str, kind: int, count: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._texts(count)
        dtype = np.dtype(self._format(key, kind))
        return np.frombuffer(self.take(count * dtype.itemsize), dtype.newbyteorder("<"))

    def _texts(self, count: int) -> list[str]:
        """Texts. A vocabulary has hundreds of thousands, so this makes no array for each of them."""
        found, place, rest = [], 0, memoryview(self.data)[self.place :]  # type: ignore[arg-type]
        try:
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", rest, place)
                place += 8 + length
                if place > len(rest):
                    break
                found.append(str(rest[place - length : place], "utf-8"))
        except struct.error:
            place = len(rest) + 1
        self.take(place)
        return found

    def _format(self, key: str, kind: int) -> str:
        if kind not in _FORMATS:
            raise InputError(
                f"{self.path} is damaged ({one_line(key)} has the unknown kind {kind}): download it again"
            )
        return _FORMATS[GGUFValueType(kind)]

    def info(self) -> tuple[str, int, tuple[int, ...], int]:
        """The name, type, shape (outputs first) and offset of a tensor."""
        name, dims = self.text(), self.number("u4")
        shape = tuple(self.number("u8") for _ in range(dims))[::-1]
        return name, self.number("u4"), shape, self.number("u8")


def _stored(path: Path, data: np.ndarray, begin: int, name: str, kind: int, shape: tuple[int, ...]) -> Stored:
    called = one_line(name)
    try:
        known = GGMLQuantizationType(kind)
        block, width = GGML_QUANT_SIZES[known]
        _require_floats(known)
    except (ValueError, NotImplementedError) as error:
        named = GGMLQuantizationType(kind).name if kind in set(GGMLQuantizationType) else str(kind)
        raise InputError(
            f"{path}: {called} has type {named}, which cannot be turned into floats: convert it to another type"
        ) from error
    if not shape or shape[-1] % block:
        raise InputError(
            f"{path}: {called} of shape {shown(list(shape))} cannot have type {known.name}: download it again"
        )
    end = begin + math.prod(shape) // block * width
    if end > len(data):
        raise InputError(f"{path} is cut off within {called}: download it again")
    return Stored(known, shape, np.asarray(data[begin:end]))


@functools.cache
def _require_floats(kind: GGMLQuantizationType) -> None:
    if kind not in _FLOATS:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
