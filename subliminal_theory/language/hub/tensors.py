"""Folders of weights as checkpoints are published: one safetensors file, or several with an index."""

import json
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from subliminal_theory.errors import InputError
from subliminal_theory.files import open_arrays, read_json, save_arrays, some, write_atomically

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# A file name in an index: it must not leave the folder.
_PLAIN = re.compile(r"[^/\\:\x00-\x1f\ud800-\udfff]+\.safetensors")

Tensor = np.ndarray | jax.Array | jax.ShapeDtypeStruct


def open_tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a folder by name, as read-only views of its memory-mapped files.

    The folder has `model.safetensors`, or the files that `model.safetensors.index.json` lists. Other files are
    ignored. All headers are checked at once. The data are read when they are used, so the files must not change. A
    view may be unaligned for its dtype; NumPy and JAX accept that.

    Raises:
        InputError: the folder cannot be read, or has no weights, or only pickle files, which are never opened; a
            file is cut off, damaged or has a dtype that NumPy lacks; index and files do not agree.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}; give a folder of weights") from error
    if INDEX in names:
        return MappingProxyType(_open_index(folder, names))
    if MODEL in names:
        return MappingProxyType(open_file(folder / MODEL)[0])
    raise InputError(_no_weights(folder, names))


def open_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of one file, as `open_arrays` returns them, and its metadata.

    Raises:
        InputError: as `open_arrays`; the message says if the file is only a Git LFS pointer.
    """
    try:
        return open_arrays(path)
    except InputError as error:
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(8) == b"version ":
                    raise InputError(f"{path} is a pointer of Git LFS: download the file that it names") from error
        raise


def release(tensor: np.ndarray) -> None:
    """Free the memory of a tensor of `open_tensors`. Its pages are read again if it is used again."""
    base: Any = tensor
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None) if not isinstance(base, memoryview) else base.obj
    if base is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = tensor.__array_interface__["data"][0] - np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    if begin < first + tensor.nbytes:
        base.madvise(mmap.MADV_DONTNEED, begin, first + tensor.nbytes - begin)


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], np.ndarray | jax.Array] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors to a folder, for `open_tensors` and other libraries to read.

    All tensors go into one file if they have at most `shard_bytes` bytes. Otherwise they go, in their order, into
    several files of at most that size, and an index is written last. A tensor larger than `shard_bytes` has a file
    of its own. If `read` is given, it returns each tensor when that is written; `tensors` then only need a shape
    and a dtype, and one tensor at a time is in host memory.

    Raises:
        InputError: the folder already has weights, which are kept, or cannot be made; `shard_bytes` is below 1; as
            `save_arrays`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another folder") from error
    held = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors") or name == INDEX]
    if held:
        raise InputError(f"{folder} already holds weights ({some(held)}): delete them or choose another folder")
    files = _shards(tensors, shard_bytes)
    for file, names in files.items():
        # Other libraries refuse files without this format.
        save_arrays(folder / file, {name: tensors[name] for name in names}, {"format": "pt"}, read)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(_bytes(tensor) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, list[str]]:
    """The names of the tensors in each file."""
    if shard_bytes < 1:
        raise InputError(f"shard_bytes must be at least 1, got {shard_bytes}")
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and _bytes(tensor) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= _bytes(tensor)
    if len(shards) == 1:
        return {MODEL: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, start=1)
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.size * tensor.dtype.itemsize


def _no_weights(folder: Path, names: Sequence[str]) -> str:
    stray = [name for name in names if name.endswith(".safetensors")]
    if stray:
        return (
            f"{folder} holds {some(stray)}, but neither {MODEL} nor {INDEX}: it is not whole, "
            "download or write it again"
        )
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        return (
            f"{folder} has its weights in pickle files ({some(pickles)}), which are never opened because they "
            "can run code: convert them to safetensors"
        )
    return f"{folder} holds no weights: give a folder with {MODEL}, or with {INDEX} and its files"


def _open_index(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    index = folder / INDEX
    files = read_index(index)
    listed = sorted(set(files.values()))
    if MODEL in names and MODEL not in listed:
        raise InputError(f"{folder} holds {MODEL} and {INDEX}, which does not list it: delete one of the two")
    missing = [file for file in listed if file not in names]
    if missing:
        raise InputError(f"{index} lists {some(missing)}, missing in the folder: download what is missing")
    found = {file: open_file(folder / file)[0] for file in listed}
    faults = [f"tensor {name!a} is not in {file}" for name, file in files.items() if name not in found[file]]
    faults += [
        f"tensor {name!a} of {file} is not listed there"
        for file, tensors in found.items()
        for name in tensors
        if files.get(name) != file
    ]
    if faults:
        raise InputError(f"{index} and its files do not agree: {some(faults)}; download all of them again")
    return {name: found[file][name] for name, file in files.items()}


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor in an index.

    Raises:
        InputError: the index cannot be read, is empty, or has a file name that is not a plain one.
    """
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path} has no weight_map, the file of every tensor: download it again")
    for name, file in files.items():
        if not isinstance(file, str) or not _PLAIN.fullmatch(file):
            raise InputError(
                f"{path}, tensor {name!a}: {file!a} is not the plain name of a safetensors file; "
                "download it again from a source that you trust"
            )
    return files
