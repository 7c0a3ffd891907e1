"""Files: atomic writes, locks, fingerprints, and named arrays in safetensors files.

A safetensors file is a header with the name, dtype and shape of each array, and then the bytes of the arrays. The
safetensors library checks what is read. It cannot write one array at a time, so this module has its own writer.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock
from jaxtyping import PyTree
from safetensors import SafetensorError, TensorSpec, safe_open

from subliminal_theory.errors import InputError, one_line
from subliminal_theory.model import leaves_by_path, path_name

# Metadata of a dataclass field that was added later: at its default, the field does not change fingerprints.
LATER = {"later": True}
METADATA = "__metadata__"  # no array can have this name
_NAMES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
CODES = {
    name: TensorSpec(dtype=name, shape=(), data_ptr=0, data_len=np.dtype(name).itemsize).dtype for name in _NAMES
}
_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")
DTYPES = {code: np.dtype(name) for name, code in CODES.items()}


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. A reader sees either the old file or the whole new one, even after a power cut.

    Raises:
        InputError: the disk is full, or the folder cannot be written. The old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _not_written(path, error) from error
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file with `atomic_file`. It raises the same errors."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into. It is renamed to `path` at the end, or removed after an error.

    Raises:
        InputError: `path` exists and is not an empty folder, the disk is full, or the parent cannot be written.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} is there already: delete it or choose another folder")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise _not_written(path, error) from error
        raise


def _not_written(path: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "what is finished is kept: make room and go on (--resume)"
        return InputError(f"the disk is full: could not write {path}; {advice}")
    return InputError(f"cannot write {path}: {error.strerror or error}; choose another folder (--out)")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder: one thread of one process works in it at a time, and others wait. Create it if needed.

    Raises:
        InputError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise InputError(f"cannot use the folder {folder}: {error.strerror}; choose another folder") from error
    with lock:
        yield


def fingerprint(*given: Any) -> str:
    """The SHA-256 of values, in hexadecimal. Equal values have equal fingerprints in every process.

    Pytrees and dataclasses enter with all their fields, including static ones, except fields with the metadata
    `LATER` at their default. Arrays enter by dtype, shape and
    bytes (typed random keys by their data), a `Path` by the content of its file, bytes as a file with that
    content, and anything else by its `repr` without memory addresses. A function's `repr` does not show what it
    closes over, so pass those values too. At most one array at a time is copied to the host.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in _parts("", given):
        digest.update(part)
    return digest.hexdigest()


def _parts(path: str, value: Any) -> Iterator[bytes | memoryview]:
    if _is_key(value):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic) and value.dtype != object:
        yield _line(path, f"{value.dtype.name} {value.shape}")
        yield raw_bytes(value)
    elif isinstance(value, Path):
        try:
            with open(value, "rb") as file:
                yield _line(path, f"file {hashlib.file_digest(file, 'sha256').hexdigest()}")
        except OSError as error:
            raise InputError(f"cannot read {value}: {error.strerror}; give a file") from error
    elif isinstance(value, bytes):
        yield _line(path, f"file {hashlib.sha256(value).hexdigest()}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield _line(path, type(value).__qualname__)
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            if field.compare and not (field.metadata.get("later") and own == field.default):
                yield from _parts(f"{path}.{field.name}", own)
    elif value is not None and not jax.tree_util.all_leaves([value]):
        children = jax.tree_util.tree_leaves_with_path(value, is_leaf=lambda node: node is not value)
        yield _line(path, f"{len(children)} in a {'mapping' if isinstance(value, Mapping) else 'sequence'}")
        for key, child in children:
            yield from _parts(path + jax.tree_util.keystr(key), child)
    else:
        text = repr(sorted(map(repr, value)) if isinstance(value, set | frozenset) else value)
        yield _line(path, text if isinstance(value, str) else re.sub(r" at 0x[0-9a-fA-F]+", "", text))


def _line(path: str, text: str) -> bytes:
    """A line preceded by its length, so that no two sequences of lines have the same bytes."""
    line = f"{path} {text}".encode("utf-8", "surrogatepass")
    return len(line).to_bytes(8, "little") + line


def raw_bytes(array: np.ndarray | np.generic | jax.Array) -> memoryview:
    """The bytes of an array in C order, little-endian."""
    # np.asarray caches the host copy on a JAX array: copy first, so that it can be freed.
    host = np.asarray(array.copy() if isinstance(array, jax.Array) else array)
    return np.ascontiguousarray(host, host.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file cannot be read, is not a JSON object, or has an object with a repeated key.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give a folder that has it") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): download or write it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: download or write it again")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(map(ascii, content))} occurs twice")
    return content


def save_arrays(
    path: Path,
    tree: PyTree,
    metadata: Mapping[str, str] | None = None,
    read: Callable[[str], np.ndarray | jax.Array] | None = None,
) -> None:
    """Write the arrays of a pytree atomically, each under its name, such as `layers/0/kernel`.

    At most one array at a time is in host memory. Equal arrays give equal bytes. Typed random keys are stored as
    their data.

    Args:
        path: the file to write.
        tree: the arrays.
        metadata: text to store with them.
        read: returns the array with a given name when it is written. The leaves of `tree` then only need a shape
            and a dtype.

    Raises:
        InputError: a dtype does not exist in the format; two names are equal, or a name is not text; or as for
            `atomic_file`.
    """
    arrays = {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves_by_path(tree).items()
    }
    if METADATA in arrays or len(arrays) < len(jax.tree.leaves(tree)):
        raise InputError(f"cannot write {path}: two arrays have one name, rename one")
    # The widest dtype first, so that all arrays are aligned.
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    try:
        for name in names:
            array = arrays[name]
            begin, end = end, end + array.size * array.dtype.itemsize
            header[name] = {"dtype": CODES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except KeyError as error:
        raise InputError(f"cannot write {path}: convert {name} from {error} to another dtype") from error
    except UnicodeEncodeError as error:
        raise InputError(f"cannot write {path}: a name is not text ({error}), rename it") from error
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(raw_bytes(arrays[name] if read is None else read(name)))


def open_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file by name, as read-only views of the memory-mapped file, and the file's metadata.

    The header is checked now. The bytes are read when they are used, so the file must not change meanwhile.

    Raises:
        InputError: the file cannot be read, is truncated or damaged, or has a dtype that NumPy lacks.
    """
    try:
        with safe_open(path, "numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            metadata = file.metadata() or {}
        data = np.memmap(path, np.uint8, "r")
        position, arrays = 8 + int.from_bytes(data[:8].tobytes(), "little"), {}
        for name, found in slices:
            shape, dtype = found.get_shape(), DTYPES[found.get_dtype()]
            arrays[name] = np.frombuffer(data, dtype, math.prod(shape), position).reshape(shape)
            position += arrays[name].nbytes
    except KeyError as error:
        raise InputError(f"{path} holds numbers of dtype {error}: convert them to one of NumPy") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): download or write it again") from error
    return arrays, metadata


def load_arrays(path: Path, like: PyTree = None) -> tuple[Any, dict[str, str]]:
    """The arrays of a file in host memory, by name or in the structure of `like`, and the file's metadata.

    The leaves of `like` only need a shape and a dtype. Where `like` has a typed random key, the stored data
    becomes a typed key again.

    Raises:
        InputError: as for `open_arrays`, or the names, shapes or dtypes differ from those in `like`.
    """
    arrays, metadata = open_arrays(path)
    if like is None:
        return {name: np.array(array) for name, array in arrays.items()}, metadata
    wanted = {
        name: jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        for name, leaf in leaves_by_path(like).items()
    }
    faults = misfits({name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}, arrays)
    if faults:
        raise InputError(
            f"{path} does not have the expected arrays ({some(faults)}): delete it or give another file"
        )

    def one(key: Any, leaf: Any) -> Any:
        array = np.array(arrays[path_name(key)])
        if not _is_key(leaf):
            return array
        impl = next(name for name in _KEYS if jax.random.key(0, impl=name).dtype == leaf.dtype)
        return jax.random.wrap_key_data(jnp.asarray(array), impl=impl)

    return jax.tree_util.tree_map_with_path(one, like), metadata


def _is_key(leaf: Any) -> bool:
    array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return array and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def misfits(wanted: Mapping[str, tuple[Sequence[int], Any]], arrays: Mapping[str, Any]) -> list[str]:
    """One phrase for each array that is missing, unexpected, or has the wrong shape, dtype or kind of dtype."""
    faults = [f"{name} is missing" for name in wanted if name not in arrays]
    faults += [f"{one_line(ascii(name)[1:-1])} is unexpected" for name in arrays if name not in wanted]
    for name, (shape, dtype) in wanted.items():
        found = arrays.get(name)
        if found is not None and found.shape != tuple(shape):
            faults.append(f"{name} is {list(found.shape)}, not {list(shape)}")
        if found is not None and not jnp.issubdtype(found.dtype, dtype):
            faults.append(f"{name} is {found.dtype}, not {dtype.__name__ if isinstance(dtype, type) else dtype}")
    return faults


def some(items: Sequence[str]) -> str:
    """The first five items, and how many more there are."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
