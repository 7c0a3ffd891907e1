"""Folders of weights: round trips, what other libraries read, indices that lie, and files that are not opened."""

import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import deserialize

from subliminal_theory.errors import InputError
from subliminal_theory.files import DTYPES, open_arrays, save_arrays
from subliminal_theory.language.hub.tensors import INDEX, MODEL, open_tensors, release, write_tensors
from tests.test_files import raw


def failure(call: Any, *arguments: Any, **keywords: Any) -> str:
    """The message of the InputError that a call must raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def numbers(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bits, infinities and NaNs among them."""
    size = math.prod(shape) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == np.bool_ else 256, size, np.uint8)
    return data.view(dtype).reshape(shape)


def some_of_all() -> dict[str, np.ndarray]:
    shapes = [(), (3,), (2, 3), (0,), (2, 0, 3), (1, 1, 5)]
    return {f"{code}.{n}": numbers(DTYPES[code], shape, n) for code in DTYPES for n, shape in enumerate(shapes)}


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


# --- round trips


@pytest.mark.parametrize("shard_bytes", [10**6, 100, 1])
def test_round_trip_of_every_dtype(tmp_path: Path, shard_bytes: int) -> None:
    written = some_of_all()
    write_tensors(tmp_path, written, shard_bytes=shard_bytes)
    found = open_tensors(tmp_path)
    assert_same(found, written)
    assert all(array.flags.aligned for array in found.values())


@given(
    written=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.sampled_from(list(DTYPES.values())).flatmap(
            lambda dtype: st.builds(numbers, st.just(dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
        ),
        min_size=1,
        max_size=5,
    ),
    shard_bytes=st.integers(1, 2000),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
def test_round_trip_of_any_names(tmp_path: Path, written: dict[str, np.ndarray], shard_bytes: int) -> None:
    shutil.rmtree(tmp_path / "folder", ignore_errors=True)
    write_tensors(tmp_path / "folder", written, shard_bytes=shard_bytes)
    assert_same(open_tensors(tmp_path / "folder"), written)
    for file in (tmp_path / "folder").glob("*.safetensors"):
        assert open_arrays(file)[1] == {"format": "pt"}


def test_layouts_that_are_not_the_format_s(tmp_path: Path) -> None:
    matrix = numbers(np.dtype(np.int32), (4, 6))
    written = {"transposed": matrix.T, "strided": matrix[::2, ::-3], "big": matrix.astype(">i4")}
    write_tensors(tmp_path, written)
    assert_same(open_tensors(tmp_path), {name: array.astype("<i4", order="C") for name, array in written.items()})


def test_arrays_of_jax_and_of_another_folder(tmp_path: Path) -> None:
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(4, dtype=jnp.bfloat16), "c": jnp.array(True)}
    first, second = tmp_path / "1", tmp_path / "2"
    write_tensors(first, arrays)
    write_tensors(second, open_tensors(first))
    assert (first / MODEL).read_bytes() == (second / MODEL).read_bytes()
    for name, array in open_tensors(second).items():
        np.testing.assert_array_equal(jnp.asarray(array), arrays[name])


def test_shards(tmp_path: Path) -> None:
    written = {name: np.zeros(size, np.uint8) for name, size in zip("abcde", (4, 4, 1, 20, 2), strict=True)}
    write_tensors(tmp_path, written, shard_bytes=8)
    files = [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert sorted(os.listdir(tmp_path)) == [*files, INDEX]
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 31},
        "weight_map": dict(zip("abcde", [files[0], files[0], *files[1:]], strict=True)),
    }
    for name, tensors, limit in (("one", written, 31), ("large", {"d": written["d"]}, 1)):
        write_tensors(tmp_path / name, tensors, shard_bytes=limit)
        assert os.listdir(tmp_path / name) == [MODEL]
    assert failure(write_tensors, tmp_path / "x", written, shard_bytes=0).startswith("shard_bytes must be ")
    assert failure(write_tensors, tmp_path / "one" / MODEL, written).startswith("cannot make the folder ")


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    written = some_of_all()
    write_tensors(tmp_path, written)
    found = dict(deserialize((tmp_path / MODEL).read_bytes()))
    assert set(found) == set(written)
    for name, array in written.items():
        assert found[name]["dtype"] == name.split(".")[0]
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()


@pytest.mark.torch
def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    written = {name: value.numpy() for name, value in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    write_tensors(tmp_path, written, shard_bytes=400)
    assert (tmp_path / INDEX).exists()
    found, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, value in found.state_dict().items():
        assert torch.equal(value, torch.tensor(written[name]))


def test_weights_are_never_overwritten(tmp_path: Path) -> None:
    for held in (MODEL, INDEX, "model-00001-of-00002.safetensors", "adapter.safetensors"):
        folder = tmp_path / held
        folder.mkdir()
        (folder / held).write_bytes(b"old")
        (folder / "config.json").touch()
        assert failure(write_tensors, folder, {"a": np.zeros(1)}) == (
            f"{folder} already holds weights ({held}): delete them or choose another folder"
        )
        assert (folder / held).read_bytes() == b"old"


PEAK = """
import resource, sys
from pathlib import Path
import jax, numpy as np
from subliminal_theory.language.hub.tensors import write_tensors
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
shapes = {name: jax.ShapeDtypeStruct((5 * 2**20,), np.float32) for name in "abcdefghijklmno"}
before = peak()
write_tensors(Path(sys.argv[1]), shapes, lambda name: np.full(5 * 2**20, ord(name), np.float32))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="units of memory differ")
def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """A file of 300 MiB, of 15 tensors."""
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, check=True)
    assert (tmp_path / MODEL).stat().st_size > 300 * 2**20
    assert int(done.stdout) < 60 * 2**20
    assert open_tensors(tmp_path)["c"][-1] == ord("c")


# --- views


def root(array: np.ndarray) -> object:
    """What owns the memory of an array."""
    owner: object = array
    while (inner := owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)) is not None:
        owner = inner
    return owner


def test_tensors_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, some_of_all())
    found = open_tensors(tmp_path)
    with pytest.raises(TypeError):
        found["F32.1"] = found["F32.1"]  # type: ignore[index]
    for array in found.values():
        assert not array.flags.writeable
        assert isinstance(root(array), mmap.mmap)
    assert len({id(root(array)) for array in found.values()}) == 1


def entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("code", [code for code, dtype in DTYPES.items() if dtype.itemsize > 1])
def test_views_that_are_not_aligned_compute_right(tmp_path: Path, code: str) -> None:
    wanted = np.arange(6).reshape(2, 3).astype(DTYPES[code])
    header = json.dumps({"odd": entry(0, 1), "a": entry(1, 1 + wanted.nbytes, code, [2, 3])}).encode()
    (tmp_path / MODEL).write_bytes(raw(header + b" " * (-len(header) % 8), b"\1" + wanted.tobytes()))
    found = open_tensors(tmp_path)["a"]
    assert not found.flags.aligned
    assert isinstance(root(found), mmap.mmap)
    np.testing.assert_array_equal(found.T + found.T, 2 * wanted.T)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jnp.asarray(found), wanted)


def test_opening_takes_no_memory_and_release_frees_it(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the memory in use is read where Linux tells it")

    def resident() -> int:
        return int(re.search(r"VmRSS:\s*(\d+) kB", status.read_text())[1]) * 1024

    size = 2**28
    with open(tmp_path / MODEL, "wb") as file:
        file.write(raw({"a": entry(0, size, "F32", [2**16, 2**10])}))
        file.truncate(file.tell() + size)
    before = resident()
    found = open_tensors(tmp_path)["a"]
    assert resident() - before < 2**24
    assert found.sum() == 0
    assert resident() - before > size // 2
    release(found)
    assert resident() - before < 2**24
    assert found[-1, -1] == 0


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "blobs", {"a": np.arange(3)})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / MODEL).symlink_to(Path("..") / "blobs" / MODEL)
    assert_same(open_tensors(tmp_path / "snapshot"), {"a": np.arange(3)})
    (tmp_path / "blobs" / MODEL).unlink()
    assert failure(open_tensors, tmp_path / "snapshot").startswith(
        f"cannot read {tmp_path / 'snapshot' / MODEL} ("
    )


# --- bad folders


def test_folders_without_weights(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "none", tmp_path / "file"):
        assert failure(open_tensors, folder).startswith(f"cannot read the folder {folder}: ")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert failure(open_tensors, folder).startswith(f"{folder} holds no weights: ")
    for name in ("a.bin", "b.PT", "c.pth", "d.ckpt", "pytorch_model.bin", "z.bin", "z.pt"):
        (folder / name).touch()
    assert failure(open_tensors, folder) == (
        f"{folder} has its weights in pickle files (a.bin, b.PT, c.pth, d.ckpt, pytorch_model.bin and 2 more), "
        "which are never opened because they can run code: convert them to safetensors"
    )
    save_arrays(folder / "model-00001-of-00002.safetensors", {})
    assert "neither model.safetensors nor " in failure(open_tensors, folder)
    (folder / MODEL).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert failure(open_tensors, folder) == (
        f"{folder / MODEL} is a pointer of Git LFS: download the file that it names"
    )
    save_arrays(folder / MODEL, {})
    assert dict(open_tensors(folder)) == {}


def indexed(folder: Path, weight_map: object, **files: str) -> Path:
    """A folder with an index and files that hold the tensors of the given letters."""
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, letters in files.items():
        tensors = {letter: np.array([ord(letter)], np.uint8) for letter in letters}
        save_arrays(folder / f"{name}.safetensors", tensors)
    return folder


def test_index(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x="a", y="b", stray="abc")
    assert {name: array.tobytes() for name, array in open_tensors(folder).items()} == {"a": b"a", "b": b"b"}
    save_arrays(folder / MODEL, {})
    assert failure(open_tensors, folder).endswith("which does not list it: delete one of the two")
    assert list(open_tensors(indexed(tmp_path / "2", {"a": MODEL}, model="a"))) == ["a"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "{}", '{"weight_map": []}'],
)
def test_bad_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    assert failure(open_tensors, tmp_path).startswith(str(tmp_path / INDEX))


@pytest.mark.parametrize(
    "file",
    [
        "/x.safetensors", "../x.safetensors", "..", ".", "", "sub/x.safetensors", "..\\x.safetensors",
        "C:x.safetensors", "x.bin", ".safetensors", "x\0.safetensors", "x\n.safetensors", "\ud83e.safetensors",
        "x.safetensors\n", 3, None, ["x.safetensors"],
    ],
)  # fmt: skip
def test_index_names_no_plain_file(tmp_path: Path, file: object) -> None:
    outside = indexed(tmp_path, {}, x="a")
    folder = indexed(outside / "sub", {"w\n": file}, x="a")
    message = failure(open_tensors, folder)
    assert message.startswith(
        rf"{folder / INDEX}, tensor 'w\n': {file!a} is not the plain name of a safetensors file"
    )


def test_index_and_files_differ(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {letter: f"{letter}.safetensors" for letter in "abcdefgh"}, h="h")
    assert failure(open_tensors, folder).startswith(
        f"{folder / INDEX} lists a.safetensors, b.safetensors, c.safetensors, d.safetensors, "
        "e.safetensors and 2 more, missing in the folder"
    )
    where = {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors", "d": "x.safetensors"}
    folder = indexed(tmp_path / "2", where, x="abe", y="bd")
    message = failure(open_tensors, folder)
    for fault in (
        "'c' is not in y.safetensors", "'d' is not in x.safetensors", "'b' of x.safetensors is not listed there",
        "'d' of y.safetensors is not listed there", "'e' of x.safetensors is not listed there",
    ):  # fmt: skip
        assert f"tensor {fault}" in message
    (folder / "y.safetensors").write_bytes(b"")
    assert failure(open_tensors, folder).startswith(f"cannot read {folder / 'y.safetensors'} (")
