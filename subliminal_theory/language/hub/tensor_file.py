"""A safetensors file: the length of its header in 8 bytes, the header, the bytes of the tensors, end to end.

The header is JSON: of every tensor its dtype, its shape and where its bytes begin and end.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from subliminal_theory.errors import InputError

MAX_HEADER = 100_000_000  # bytes; other readers of the format allow no more
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
METADATA = "__metadata__"
AGAIN = "download or write it again"


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class _Unsupported(ValueError):
    """A file that is sound but of no use here: another copy would not help."""


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself, beside its tensors; {} if it says nothing.

    Raises:
        InputError: as `open_tensors`.
    """
    return open_file(path)[0]


def open_file(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors of one file."""
    try:
        with open(path, "rb") as file:
            metadata, entries, start = _read_header(file)
            data = np.memmap(file, np.uint8, "r")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {AGAIN}") from error
    except ValueError as error:
        raise InputError(f"{path}{error}") from error
    tensors = {
        name: np.frombuffer(data, entry.dtype, math.prod(entry.shape), start + entry.begin).reshape(entry.shape)
        for name, entry in entries.items()
    }
    return metadata, tensors


def _read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, _Entry], int]:
    """Metadata, tensors and where their bytes start, all checked; a ValueError goes on after the file's name."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    if len(first) < 8:
        raise ValueError(f" has {size} bytes, fewer than any safetensors file: {AGAIN}")
    length = int.from_bytes(first, "little")
    start = 8 + length
    if first == b"version ":
        raise ValueError(" is no safetensors file but a pointer to one in Git LFS: download what it points to")
    if length > MAX_HEADER:
        raise ValueError(f" is no safetensors file (a header of {length} bytes): {AGAIN}")
    if start > size:
        raise ValueError(f" is cut within its header, at least {start - size} bytes are missing: {AGAIN}")
    try:
        metadata, entries = _parse_header(file.read(length))
    except _Unsupported:
        raise
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from error
    end = start + max((entry.end for entry in entries.values()), default=0)
    if end > size:
        raise ValueError(f" is cut, {end - size} of {end} bytes are missing: {AGAIN}")
    if end < size:
        raise ValueError(f" has {size - end} bytes after its last tensor: {AGAIN}")
    return metadata, entries, start


def _parse_header(data: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata and tensors; a ValueError says what is wrong, to follow the file's name."""
    if data[:1] != b"{":
        raise ValueError(" has a header that is not a JSON object")
    try:
        content = parse_json(data)
    except ValueError as error:
        raise ValueError(f" has a header that is {error}") from error
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(" has metadata that does not map text to text")
    try:
        "".join([*content, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(" has half a surrogate pair in its header, which is no text") from error
    entries = {}
    for name, entry in content.items():
        try:
            entries[name] = _parse_entry(entry)
        except ValueError as error:
            raise type(error)(f", tensor {quote(name)}: {error}") from error
    _require_end_to_end(entries)
    return metadata, entries


def _parse_entry(entry: Any) -> _Entry:
    if not isinstance(entry, dict):
        raise ValueError("its entry is not a JSON object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise ValueError(f"no {key}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str):
        raise ValueError(f"dtype {quote(code)} is not text")
    if code not in DTYPES:
        raise _Unsupported(f"dtype {quote(code)} is not one of {', '.join(DTYPES)}: give weights of these")
    # No array of numpy has more than 64 axes.
    if not _are_sizes(shape) or len(shape) > 64:
        raise ValueError(f"shape {quote(shape)} is no list of at most 64 sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {quote(offsets)} are not a begin and an end")
    # Numpy multiplies the other sizes even where one is 0.
    if math.prod(filter(None, shape)) * DTYPES[code].itemsize >= 2**63:
        raise ValueError(f"shape {quote(shape)} is too large")
    found, needed = offsets[1] - offsets[0], math.prod(shape) * DTYPES[code].itemsize
    if found != needed:
        raise ValueError(f"{found} bytes where {code} of shape {quote(shape)} takes {needed}")
    return _Entry(DTYPES[code], tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _require_end_to_end(entries: Mapping[str, _Entry]) -> None:
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise ValueError(f", tensor {quote(name)}: {position - entry.begin} bytes overlap {before}")
        if entry.begin > position:
            raise ValueError(f", tensor {quote(name)}: {entry.begin - position} unused bytes after {before}")
        position, before = entry.end, f"tensor {quote(name)}"


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys; a ValueError says what the bytes are instead."""
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"it has {quote(key)} twice")
        content[key] = value
    return content


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


@dataclass(frozen=True)
class Spec:
    """What the header says of a tensor that is to be written."""

    code: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.code].itemsize


def specs_of(folder: Path, tensors: Mapping[str, np.ndarray | jax.Array]) -> dict[str, Spec]:
    """What the headers will say of tensors.

    Raises:
        InputError: there are none, or a name or dtype that the format lacks.
    """
    if not tensors:
        raise InputError(f"there are no tensors to write to {folder}")
    specs = {}
    for name, tensor in tensors.items():
        where = f"cannot write tensor {quote(name)} to {folder}"
        if name == METADATA:
            raise InputError(f"{where}: the format keeps this name for itself, give another")
        if tensor.dtype.name not in CODES:
            raise InputError(f"{where}: {tensor.dtype} is not one of {', '.join(CODES)}, convert it")
        specs[name] = Spec(CODES[tensor.dtype.name], tensor.shape)
    return specs


def header_of(folder: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """What precedes the bytes of the tensors."""
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise InputError(f"the metadata for {folder} must map text to text")
    content: dict[str, Any] = {METADATA: {**metadata, "format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.bytes
        content[name] = {"dtype": spec.code, "shape": spec.shape, "data_offsets": [begin, end]}
    try:
        data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"cannot write to {folder}: a name or the metadata has half a surrogate pair, which is no text"
        ) from error
    data += b" " * (-len(data) % 8)
    if len(data) > MAX_HEADER:
        raise InputError(f"cannot write to {folder}: names and metadata exceed {MAX_HEADER} bytes, shorten them")
    return len(data).to_bytes(8, "little") + data


def numbers_of(tensor: np.ndarray | jax.Array) -> memoryview:
    """The bytes of a tensor as the format has them, in the order of its axes and the lowest byte first."""
    # JAX keeps the numbers that it fetched from a device as long as the array they are of, here a copy.
    numbers = np.asarray(tensor.copy() if isinstance(tensor, jax.Array) else tensor)
    return np.ascontiguousarray(numbers, DTYPES[CODES[numbers.dtype.name]]).reshape(-1).view(np.uint8).data


def misfits(wanted: Mapping[str, Sequence[int]], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """What is missing, unexpected or of another shape than wanted among tensors, a phrase each."""
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{plain(name)} is unexpected" for name in tensors if name not in wanted]
    return faults + [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]


def plain(name: str) -> str:
    """A name that somebody else chose, on one line."""
    return quote(name).strip('"')


def quote(value: Any) -> str:
    """As JSON, on one line and not too long."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def some(items: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
