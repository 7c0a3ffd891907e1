"""Files: whole or not at all, one writer at a time, recognized by what decides them."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from subliminal_theory.errors import InputError
from subliminal_theory.files import (
    DTYPES,
    LATER,
    atomic_file,
    atomic_folder,
    fingerprint,
    load_arrays,
    locked,
    open_arrays,
    read_json,
    save_arrays,
    write_atomically,
)
from subliminal_theory.pytree import register_dataclass


def test_atomic_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"new", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "the disk is full: could not write "), (errno.EROFS, "cannot write ")]
)
def test_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=f"^{message}{tmp_path / 'file'}"):
        write_atomically(tmp_path / "file", b"new")
    with pytest.raises(InputError, match=f"^{message}{tmp_path / 'folder'}"), atomic_folder(tmp_path / "folder"):
        fail()
    assert not list(tmp_path.iterdir())


def test_atomic_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "new"
    with pytest.raises(TypeError), atomic_folder(path) as folder:
        (folder / "half").write_bytes(None)  # type: ignore[arg-type]
    assert not list(path.parent.iterdir())
    (path.parent / ".new.tmp").mkdir()  # left by a killed process
    (path.parent / ".new.tmp" / "old").touch()
    with atomic_folder(path) as folder:
        (folder / "file").touch()
        assert not path.exists()
    assert [*path.parent.iterdir(), *path.iterdir()] == [path, path / "file"]
    for there in (path, path / "file"):
        with pytest.raises(InputError, match="is there already"), atomic_folder(there):
            pass
    assert (path / "file").exists()


def test_one_thread_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with locked(tmp_path / "new"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == 1
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot use the folder"), locked(tmp_path / "file"):
        pass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    rate: Any
    optimizer: str = dataclasses.field(default="adam", metadata={"static": True})


def test_fingerprint_tells_values_apart(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    key = jax.random.key(0)
    values = [
        (), (None,), ([],), ({},), (1,), (1.0,), ("1",), (1, 2), ((1, 2),), ("1", "2"), ("1 2",), ({"a": 1},),
        ({"a": 2},), ({"b": 1},), (np.zeros(2),), (np.zeros(2, np.float32),), (np.zeros((2, 1)),),
        (np.zeros((1, 2)),), (np.array([0.0, -0.0]),), (jnp.zeros(2, jnp.bfloat16),), (key,),
        (jax.random.key(1),), (jax.random.split(key),), (Run(0.1),), (Run(0.2),), (Run(0.1, "sgd"),),
        (tmp_path / "one",), (tmp_path / "two",), ({"a", "b"},), ({"a"},), (len,), (repr,), ("\ud83e",),
        (np.zeros(2), np.zeros(2)), ([np.zeros(2)], np.zeros(2)),
    ]  # fmt: skip
    assert len({fingerprint(*given) for given in values}) == len(values)


@dataclasses.dataclass(frozen=True)
class _Before:
    one: int = 1


@dataclasses.dataclass(frozen=True)
class _After:
    one: int = 1
    two: object = dataclasses.field(default=None, metadata=LATER)


def test_fields_that_were_added_later() -> None:
    """At their default, they leave fingerprints as they were."""
    _After.__qualname__ = _Before.__qualname__
    assert fingerprint(_After()) == fingerprint(_Before())
    assert fingerprint(_After(two=0)) != fingerprint(_Before())
    assert fingerprint(_After(2)) == fingerprint(_Before(2)) != fingerprint(_Before())


def test_fingerprint_of_equal_values(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"same")
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    pairs: list[tuple[Any, Any]] = [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (array, jnp.asarray(array)), (array, array.T.copy().T),
        (array, array[::-1][::-1]), (jax.random.key(3), jax.random.key(3)), (Run(1), Run(1)), ((1, 2), [1, 2]),
        (tmp_path / "one", tmp_path / "two"), (lambda: 1, lambda: 2), ({"a", "b", "c"}, {"c", "b", "a"}),
    ]  # fmt: skip
    for one, other in pairs:
        assert fingerprint(one) == fingerprint(other)
    with pytest.raises(InputError, match="cannot read"):
        fingerprint(tmp_path / "none")


@pytest.mark.slow
def test_fingerprint_in_another_process() -> None:
    """Neither the order of sets nor addresses in memory show."""
    code = (
        "from subliminal_theory.files import fingerprint; from subliminal_theory.language.model.lora import "
        "add_lora; print(fingerprint({'a', 'b', 'c'}, add_lora, [1, 'x']))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=-1, check=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout


def example() -> dict[str, Any]:
    arrays = [jnp.arange(1, 7).reshape(3, 2).T.astype(dtype) for dtype in DTYPES.values() if dtype.itemsize < 8]
    return {"all": arrays, "none": None, "key": jax.random.split(jax.random.key(0), 3), "empty": np.zeros((0, 3))}


def same(one: Any, other: Any) -> bool:
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, other)
    return jax.tree.all(equal) and jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.slow
def test_arrays_of_all_dtypes(tmp_path: Path) -> None:
    path, given = tmp_path / "a.safetensors", example()
    save_arrays(path, given, {"b": "two", "a": "ü"})
    found, text = load_arrays(path, given)
    assert text == {"b": "two", "a": "ü"}
    assert same(found, given)
    first = path.read_bytes()
    save_arrays(path, found, {"b": "two", "a": "ü"})
    assert path.read_bytes() == first
    views, _ = open_arrays(path)
    assert all(not view.flags.writeable and view.flags.aligned for view in views.values())
    assert (
        load_arrays(path)[0].keys()
        == views.keys()
        == {"key", "empty", *(f"all/{i}" for i in range(len(given["all"])))}
    )


def test_the_library_reads_what_is_written_and_the_reverse(tmp_path: Path) -> None:
    arrays = {"big": np.arange(3, dtype=">i8"), "half": np.ones((2, 2), np.float16), "model.x": np.array(2.5)}
    save_arrays(tmp_path / "ours", arrays)
    safetensors.numpy.save_file(
        {name: a.astype(a.dtype.newbyteorder("=")) for name, a in arrays.items()}, tmp_path / "t"
    )
    for found in (safetensors.numpy.load_file(tmp_path / "ours"), load_arrays(tmp_path / "t")[0]):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


def test_arrays_that_cannot_be_written(tmp_path: Path) -> None:
    for tree in (
        {"a": jnp.zeros(2, "int4")}, {"a": np.zeros(2, complex)}, {"\ud83e": np.zeros(2)},
        {"__metadata__": np.zeros(2)}, {"a/b": np.zeros(2), "a": {"b": np.zeros(2)}},
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"^cannot write"):
            save_arrays(tmp_path / "a", tree)
    assert not list(tmp_path.iterdir())


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "no header": b"\xff" * 8,
    "cut in the header": (100).to_bytes(8, "little") + b"{}",
    "cut in the data": raw({"a": ENTRY}, bytes(7)),
    "too long": raw({"a": ENTRY}, bytes(9)),
    "overlapping": raw({"a": ENTRY, "b": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
    "with a hole": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}}, bytes(17)),
    "one name for two arrays": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "a list": raw([]),
    "no JSON": raw(b'{"a'),
    "deep": raw(b'{"a":' * 100_000),
    "not UTF-8": raw(b'{"\xff":1}'),
    "unknown dtype": raw({"a": {**ENTRY, "dtype": "F31"}}, bytes(8)),
    "dtype that NumPy lacks": raw({"a": {**ENTRY, "dtype": "F4", "shape": [16]}}, bytes(8)),
    "wrong size": raw({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
    "negative": raw({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
    "huge": raw({"a": {**ENTRY, "shape": [2**62, 2**62]}}, bytes(8)),
    "huge and empty": raw({"a": {**ENTRY, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
    "too many axes": raw({"a": {**ENTRY, "shape": [1] * 70, "data_offsets": [0, 4]}}, bytes(4)),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": ENTRY}, bytes(8)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_arrays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(InputError, match=str(path)) as error:
        open_arrays(path)
    assert len(str(error.value).splitlines()) == 1


one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
VALID = raw(
    {
        "__metadata__": {"a": "b"},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "v": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]},
    },
    bytes(range(12)),
)
SIGNS = [b"0", b"9", b"-1", b'"', b"[", b"]", b"{", b"}", b","]
EDIT = st.tuples(
    st.integers(0, len(VALID)), st.integers(0, 3), st.one_of(st.binary(max_size=3), st.sampled_from(SIGNS))
)


@pytest.mark.slow
@given(edits=st.lists(EDIT, max_size=4), fitting=st.booleans())
@settings(one_folder, max_examples=300)
def test_no_bytes_give_another_exception(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], fitting: bool
) -> None:
    """Whatever the bytes: they are refused, or read as the library reads them."""
    content = VALID
    for position, removed, added in edits:
        content = content[:position] + added + content[position + removed :]
    if fitting:
        content = raw(content[8:-12], content[-12:])
    (tmp_path / "a").write_bytes(content)
    try:
        found, _ = open_arrays(tmp_path / "a")
    except InputError:
        return
    wanted = dict(deserialize(content))
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert (array.tobytes(), list(array.shape)) == (bytes(wanted[name]["data"]), wanted[name]["shape"])


def test_arrays_that_are_not_there_or_others(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot read"):
            load_arrays(path)
    path = tmp_path / "a"
    save_arrays(path, {"a": np.zeros(3), "b": np.zeros(3, np.float32), "c": np.zeros(2), "d\n": np.zeros(1)})
    like = {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(2), "e": np.zeros(1)}
    faults = r"e is missing, d\\n is unexpected, a is \[3\], not \[2\], b is float32, not float64"
    with pytest.raises(InputError, match=faults):
        load_arrays(path, like)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}', "\xff", "[" * 10**5]
)
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=f"^{path} (is not valid JSON|holds no JSON object)"):
        read_json(path)
    path.write_text('{"a": {"b": 1}, "b": {"b": 2}}')
    assert read_json(path) == {"a": {"b": 1}, "b": {"b": 2}}
    with pytest.raises(InputError, match=r"^cannot read "):
        read_json(tmp_path / "none")
