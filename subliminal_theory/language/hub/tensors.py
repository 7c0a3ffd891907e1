"""Folders of weights as checkpoints are published: safetensors files, one or several with an index."""

import contextlib
import errno
import json
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.tensor_file import (
    AGAIN,
    DTYPES,
    Spec,
    header_of,
    numbers_of,
    open_file,
    parse_json,
    quote,
    some,
    specs_of,
)

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What an index may name: nothing outside its folder.
_PLAIN = re.compile(r"[^/\\:\x00-\x1f\ud800-\udfff]+\.safetensors")
# What `write_tensors` leaves when it is killed.
_LEFTOVER = re.compile(r"\.model(-\d+-of-\d+)?\.safetensors(\.index\.json)?\.\d+\.tmp")


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
        return MappingProxyType(open_file(folder / MODEL)[1])
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
    files = _shards(specs_of(folder, tensors), shard_bytes)
    headers = {file: header_of(folder, specs, metadata) for file, specs in files.items()}
    temporaries: list[Path] = []
    named: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_no_weights(folder)
        _remove_leftovers(folder)
        for file, specs in files.items():
            temporaries.append(_temporary(folder, file))
            _write_file(temporaries[-1], headers[file], (numbers_of(tensors[name]) for name in specs))
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


def _no_weights(folder: Path, names: Sequence[str]) -> str:
    stray = [quote(name) for name in names if name.endswith(".safetensors")]
    if stray:
        return f"{folder} holds {some(stray)}, but neither {MODEL} nor {INDEX}: it is not whole, {AGAIN}"
    pickles = [quote(name) for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        return (
            f"{folder} has its weights in pickle files ({some(pickles)}), which are never opened because they "
            "can run code: convert them to safetensors"
        )
    return f"{folder} holds no weights: give a folder with {MODEL}, or with {INDEX} and its files"


def _open_index(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    index = folder / INDEX
    files = _read_index(index)
    listed = sorted(set(files.values()))
    if MODEL in names and MODEL not in listed:
        raise InputError(f"{folder} holds {MODEL} and {INDEX}, which does not list it: delete one of the two")
    missing = [quote(file) for file in listed if file not in names]
    if missing:
        raise InputError(f"{index} lists {some(missing)}, missing in the folder: download what is missing")
    found = {file: open_file(folder / file)[1] for file in listed}
    holders: dict[str, list[str]] = {}
    for file, tensors in found.items():
        for name in tensors:
            holders.setdefault(name, []).append(file)
    checks = [_fault(name, files.get(name), holders.get(name, [])) for name in sorted({*files, *holders})]
    faults = [fault for fault in checks if fault]
    if faults:
        raise InputError(f"{index} and its files do not agree: {some(faults)}; download all of them again")
    return {name: found[file][name] for name, file in files.items()}


def _fault(name: str, listed: str | None, holders: Sequence[str]) -> str | None:
    """What is wrong with a tensor that the index lists in a file, or not at all, and that some files hold."""
    tensor, files = f"tensor {quote(name)}", " and ".join(quote(file) for file in holders)
    if len(holders) > 1:
        return f"{tensor} is in {files}"
    if listed is None:
        return f"{tensor} of {files} is not listed"
    if not holders:
        return f"{tensor} is not in {quote(listed)}"
    return None if listed in holders else f"{tensor} is in {files}, not in {quote(listed)}"


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        content = parse_json(path.read_bytes())
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
                f"{path}, tensor {quote(name)}: {quote(file)} is not the plain name of a safetensors file; "
                "download it again from a source that you trust"
            )
    return files


def _shards(specs: Mapping[str, Spec], shard_bytes: int) -> dict[str, dict[str, Spec]]:
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
        file: {name: specs[name] for name in sorted(shard, key=lambda name: -DTYPES[specs[name].code].itemsize)}
        for file, shard in zip(files if len(shards) > 1 else [MODEL], shards, strict=True)
    }


def _index(files: Mapping[str, Mapping[str, Spec]]) -> bytes:
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


def _require_no_weights(folder: Path) -> None:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors") or name == INDEX)
    if names:
        held = some([quote(name) for name in names])
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
