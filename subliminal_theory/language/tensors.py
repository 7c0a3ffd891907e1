"""Folders of weights as checkpoints are published: safetensors files, one or several with an index.

A file is the length of its header in 8 bytes, the header (JSON: of every tensor its dtype, its shape and where
its bytes begin and end) and the bytes of the tensors, end to end.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from subliminal_theory.errors import InputError

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; other readers of the format allow no more
_DTYPES = {
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
_CODES = {dtype.name: code for code, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What an index may name: nothing outside its folder.
_PLAIN = re.compile(r"[^/\\:\x00-\x1f\ud800-\udfff]+\.safetensors")
# What `write_tensors` leaves when it is killed.
_LEFTOVER = re.compile(r"\.model(-\d+-of-\d+)?\.safetensors(\.index\.json)?\.\d+\.tmp")
_AGAIN = "download or write it again"


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class _Unsupported(ValueError):
    """A file that is sound but of no use here: another copy would not help."""


def open_tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a folder by name, as read-only views of its memory-mapped files.

    The folder holds `model.safetensors`, or files that `model.safetensors.index.json` lists; others are ignored.
    All headers are checked now; the numbers are read when they are used, so the files must stay as they are. A
    view need not be aligned to its dtype: numpy and JAX take that as it comes.

    Raises:
        InputError: the folder cannot be read or holds no weights, or only pickle files, which are never opened;
            a file is cut, damaged or has a dtype that numpy lacks; index and files do not agree.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}; give a folder of weights") from error
    if INDEX in names:
        return MappingProxyType(_open_index(folder, names))
    if MODEL in names:
        return MappingProxyType(_open_file(folder / MODEL)[1])
    raise InputError(_no_weights(folder, names))


def release(tensor: np.ndarray) -> None:
    """Give the memory back that holds a tensor of `open_tensors`; its pages are read anew if it is used again."""
    base: Any = tensor
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None) if not isinstance(base, memoryview) else base.obj
    if base is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = tensor.__array_interface__["data"][0] - np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    if begin < first + tensor.nbytes:
        base.madvise(mmap.MADV_DONTNEED, begin, first + tensor.nbytes - begin)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself, beside its tensors; {} if it says nothing.

    Raises:
        InputError: as `open_tensors`.
    """
    return _open_file(path)[0]


def write_tensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray | jax.Array],
    metadata: Mapping[str, str],
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Write tensors as `open_tensors` and other libraries read them; the folder is made if there is none.

    All go into one file, or, if they have more bytes than `shard_bytes`, in their order into several of at most
    that size (a larger tensor has one for itself), with an index. Every file has the metadata, and in it the
    format "pt", without which others do not load it. One tensor at a time is held in memory. The files get their
    names when all are whole, the index last: killed at any moment, this leaves weights that are whole, or none
    that `open_tensors` takes. One process at a time may write to a folder.

    Raises:
        InputError: the folder already holds weights, which stay; there are no tensors; a dtype or a name that the
            format lacks; metadata that is not text; shard_bytes below 1; the disk is full or the folder cannot be
            written, in which case nothing new stays in it.
    """
    files = _shards(_specs(folder, tensors), shard_bytes)
    headers = {file: _header(folder, specs, metadata) for file, specs in files.items()}
    temporaries: list[Path] = []
    named: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_no_weights(folder)
        _remove_leftovers(folder)
        for file, specs in files.items():
            temporaries.append(_temporary(folder, file))
            _write_file(temporaries[-1], headers[file], (_numbers(tensors[name]) for name in specs))
        if len(files) > 1:
            temporaries.append(_temporary(folder, INDEX))
            _write_file(temporaries[-1], _index(files))
        _require_no_weights(folder)
        for temporary, file in zip(temporaries, [*files, INDEX], strict=False):
            os.replace(temporary, folder / file)
            named.append(folder / file)
    except BaseException as error:
        # The index goes first: without it the rest is not taken for weights.
        for path in [*reversed(named), *temporaries]:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, OSError):
            raise InputError(_cannot_write(folder, error)) from error
        raise


# --- reading


def _no_weights(folder: Path, names: Sequence[str]) -> str:
    stray = [_quote(name) for name in names if name.endswith(".safetensors")]
    if stray:
        return f"{folder} holds {_some(stray)}, but neither {MODEL} nor {INDEX}: it is not whole, {_AGAIN}"
    pickles = [_quote(name) for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        return (
            f"{folder} has its weights in pickle files ({_some(pickles)}), which are never opened because they "
            "can run code: convert them to safetensors"
        )
    return f"{folder} holds no weights: give a folder with {MODEL}, or with {INDEX} and its files"


def _open_index(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    index = folder / INDEX
    files = _read_index(index)
    listed = sorted(set(files.values()))
    if MODEL in names and MODEL not in listed:
        raise InputError(f"{folder} holds {MODEL} and {INDEX}, which does not list it: delete one of the two")
    missing = [_quote(file) for file in listed if file not in names]
    if missing:
        raise InputError(f"{index} lists {_some(missing)}, missing in the folder: download what is missing")
    found = {file: _open_file(folder / file)[1] for file in listed}
    holders: dict[str, list[str]] = {}
    for file, tensors in found.items():
        for name in tensors:
            holders.setdefault(name, []).append(file)
    checks = [_fault(name, files.get(name), holders.get(name, [])) for name in sorted({*files, *holders})]
    faults = [fault for fault in checks if fault]
    if faults:
        raise InputError(f"{index} and its files do not agree: {_some(faults)}; download all of them again")
    return {name: found[file][name] for name, file in files.items()}


def _fault(name: str, listed: str | None, holders: Sequence[str]) -> str | None:
    """What is wrong with a tensor that the index lists in a file, or not at all, and that some files hold."""
    tensor, files = f"tensor {_quote(name)}", " and ".join(_quote(file) for file in holders)
    if len(holders) > 1:
        return f"{tensor} is in {files}"
    if listed is None:
        return f"{tensor} of {files} is not listed"
    if not holders:
        return f"{tensor} is not in {_quote(listed)}"
    return None if listed in holders else f"{tensor} is in {files}, not in {_quote(listed)}"


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        content = _parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; download it again") from error
    except ValueError as error:
        raise InputError(f"{path} is {error}: download it again") from error
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path} has no weight_map, the file of every tensor: download it again")
    for name, file in files.items():
        if not isinstance(file, str) or not _PLAIN.fullmatch(file):
            raise InputError(
                f"{path}, tensor {_quote(name)}: {_quote(file)} is not the plain name of a safetensors file; "
                "download it again from a source that you trust"
            )
    return files


def _open_file(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors of one file."""
    try:
        with open(path, "rb") as file:
            metadata, entries, start = _read_header(file)
            data = np.memmap(file, np.uint8, "r")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {_AGAIN}") from error
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
        raise ValueError(f" has {size} bytes, fewer than any safetensors file: {_AGAIN}")
    length = int.from_bytes(first, "little")
    start = 8 + length
    if first == b"version ":
        raise ValueError(" is no safetensors file but a pointer to one in Git LFS: download what it points to")
    if length > MAX_HEADER:
        raise ValueError(f" is no safetensors file (a header of {length} bytes): {_AGAIN}")
    if start > size:
        raise ValueError(f" is cut within its header, at least {start - size} bytes are missing: {_AGAIN}")
    try:
        metadata, entries = _parse_header(file.read(length))
    except _Unsupported:
        raise
    except ValueError as error:
        raise ValueError(f"{error}: {_AGAIN}") from error
    end = start + max((entry.end for entry in entries.values()), default=0)
    if end > size:
        raise ValueError(f" is cut, {end - size} of {end} bytes are missing: {_AGAIN}")
    if end < size:
        raise ValueError(f" has {size - end} bytes after its last tensor: {_AGAIN}")
    return metadata, entries, start


def _parse_header(data: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata and tensors; a ValueError says what is wrong, to follow the file's name."""
    if data[:1] != b"{":
        raise ValueError(" has a header that is not a JSON object")
    try:
        content = _parse_json(data)
    except ValueError as error:
        raise ValueError(f" has a header that is {error}") from error
    metadata = content.pop(_METADATA, {})
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
            raise type(error)(f", tensor {_quote(name)}: {error}") from error
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
        raise ValueError(f"dtype {_quote(code)} is not text")
    if code not in _DTYPES:
        raise _Unsupported(f"dtype {_quote(code)} is not one of {', '.join(_DTYPES)}: give weights of these")
    # No array of numpy has more than 64 axes.
    if not _are_sizes(shape) or len(shape) > 64:
        raise ValueError(f"shape {_quote(shape)} is no list of at most 64 sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {_quote(offsets)} are not a begin and an end")
    # Numpy multiplies the other sizes even where one is 0.
    if math.prod(filter(None, shape)) * _DTYPES[code].itemsize >= 2**63:
        raise ValueError(f"shape {_quote(shape)} is too large")
    found, needed = offsets[1] - offsets[0], math.prod(shape) * _DTYPES[code].itemsize
    if found != needed:
        raise ValueError(f"{found} bytes where {code} of shape {_quote(shape)} takes {needed}")
    return _Entry(_DTYPES[code], tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _require_end_to_end(entries: Mapping[str, _Entry]) -> None:
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise ValueError(f", tensor {_quote(name)}: {position - entry.begin} bytes overlap {before}")
        if entry.begin > position:
            raise ValueError(f", tensor {_quote(name)}: {entry.begin - position} unused bytes after {before}")
        position, before = entry.end, f"tensor {_quote(name)}"


def _parse_json(data: bytes) -> dict[str, Any]:
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
            raise ValueError(f"it has {_quote(key)} twice")
        content[key] = value
    return content


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


# --- writing


@dataclass(frozen=True)
class _Spec:
    code: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.code].itemsize


def _specs(folder: Path, tensors: Mapping[str, np.ndarray | jax.Array]) -> dict[str, _Spec]:
    if not tensors:
        raise InputError(f"there are no tensors to write to {folder}")
    specs = {}
    for name, tensor in tensors.items():
        where = f"cannot write tensor {_quote(name)} to {folder}"
        if name == _METADATA:
            raise InputError(f"{where}: the format keeps this name for itself, give another")
        if tensor.dtype.name not in _CODES:
            raise InputError(f"{where}: {tensor.dtype} is not one of {', '.join(_CODES)}, convert it")
        specs[name] = _Spec(_CODES[tensor.dtype.name], tensor.shape)
    return specs


def _shards(specs: Mapping[str, _Spec], shard_bytes: int) -> dict[str, dict[str, _Spec]]:
    """The tensors of every file, the widest numbers first, so that all are aligned."""
    if shard_bytes < 1:
        raise InputError(f"shard_bytes must be at least 1, got {shard_bytes}")
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, spec in specs.items():
        if shards[-1] and spec.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= spec.bytes
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    return {
        file: {name: specs[name] for name in sorted(shard, key=lambda name: -_DTYPES[specs[name].code].itemsize)}
        for file, shard in zip(files if len(shards) > 1 else [MODEL], shards, strict=True)
    }


def _header(folder: Path, specs: Mapping[str, _Spec], metadata: Mapping[str, str]) -> bytes:
    """What precedes the bytes of the tensors."""
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise InputError(f"the metadata for {folder} must map text to text")
    content: dict[str, Any] = {_METADATA: {**metadata, "format": "pt"}}
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


def _index(files: Mapping[str, Mapping[str, _Spec]]) -> bytes:
    total = sum(spec.bytes for specs in files.values() for spec in specs.values())
    weight_map = {name: file for file, specs in files.items() for name in specs}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, start: bytes, rest: Iterable[memoryview] = ()) -> None:
    with open(path, "wb") as file:
        file.write(start)
        for part in rest:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _numbers(tensor: np.ndarray | jax.Array) -> memoryview:
    """The bytes of a tensor as the format has them, in the order of its axes and the lowest byte first."""
    # JAX keeps the numbers that it fetched from a device as long as the array they are of, here a copy.
    numbers = np.asarray(tensor.copy() if isinstance(tensor, jax.Array) else tensor)
    return np.ascontiguousarray(numbers, _DTYPES[_CODES[numbers.dtype.name]]).reshape(-1).view(np.uint8).data


def _require_no_weights(folder: Path) -> None:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors") or name == INDEX)
    if names:
        held = _some([_quote(name) for name in names])
        raise InputError(f"{folder} already holds weights ({held}): delete them or choose another folder")


def _remove_leftovers(folder: Path) -> None:
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def _temporary(folder: Path, file: str) -> Path:
    return folder / f".{file}.{os.getpid()}.tmp"


def _cannot_write(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full: could not write the weights to {folder}; make room or choose another folder"
    return f"cannot write the weights to {folder}: {error.strerror or error}; choose another folder"


# --- messages


def _quote(value: Any) -> str:
    """As JSON, on one line and not too long."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
