import errno
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, deserialize, safe_open

from subliminal_theory.errors import InputError
from subliminal_theory.language import tensor_file
from subliminal_theory.language import tensors as module
from subliminal_theory.language.hub.tensor_file import MAX_HEADER, read_metadata
from subliminal_theory.language.hub.tensors import INDEX, MODEL, open_tensors, write_tensors

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
ALL = "F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL"
AGAIN = "download or write it again"
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def failure(call, *arguments, **keywords) -> str:
    """The message of the InputError that a call must raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def raw(header: object, data: bytes = b"") -> bytes:
    """A file with a header that is given as JSON or as its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def single(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MODEL).write_bytes(content)
    return folder


def numbers(dtype: object, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bits, infinities and NaNs among them."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
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


def root(array: np.ndarray) -> object:
    """What owns the memory of an array."""
    owner: object = array
    while (inner := owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)) is not None:
        owner = inner
    return owner


# --- round trips


@pytest.mark.parametrize("shard_bytes", [10**6, 100, 1])
def test_round_trip_of_every_dtype(tmp_path: Path, shard_bytes: int) -> None:
    written = some_of_all()
    write_tensors(tmp_path / "new" / "folder", written, {"step": "3"}, shard_bytes)
    found = open_tensors(tmp_path / "new" / "folder")
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
    metadata=st.dictionaries(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=5)] * 2, max_size=2),
    shard_bytes=st.integers(1, 2000),
)
@settings(one_folder, max_examples=30)
def test_round_trip_of_any_names(tmp_path: Path, written, metadata, shard_bytes) -> None:
    shutil.rmtree(tmp_path / "folder", ignore_errors=True)
    write_tensors(tmp_path / "folder", written, metadata, shard_bytes)
    assert_same(open_tensors(tmp_path / "folder"), written)
    for file in (tmp_path / "folder").glob("*.safetensors"):
        assert read_metadata(file) == {**metadata, "format": "pt"}


def test_layouts_that_are_not_the_format_s(tmp_path: Path) -> None:
    matrix = numbers(np.int32, (4, 6))
    written = {"transposed": matrix.T, "strided": matrix[::2, ::-3], "big": matrix.astype(">i4"), "fixed": matrix}
    written["fixed"].flags.writeable = False
    write_tensors(tmp_path, written, {})
    assert_same(
        open_tensors(tmp_path),
        {name: np.ascontiguousarray(array.astype(np.int32)) for name, array in written.items()},
    )


def test_arrays_of_jax_and_of_another_folder(tmp_path: Path) -> None:
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(4, dtype=jnp.bfloat16), "c": jnp.array(True)}
    write_tensors(tmp_path / "1", arrays, {})
    assert_same(open_tensors(tmp_path / "1"), {name: np.asarray(array) for name, array in arrays.items()})
    write_tensors(tmp_path / "2", open_tensors(tmp_path / "1"), {})
    assert (tmp_path / "1" / MODEL).read_bytes() == (tmp_path / "2" / MODEL).read_bytes()
    for name, array in open_tensors(tmp_path / "2").items():
        np.testing.assert_array_equal(jnp.asarray(array), arrays[name])


def test_shards(tmp_path: Path) -> None:
    written = {name: numbers(np.uint8, (size,)) for name, size in zip("abcde", (4, 4, 1, 20, 2), strict=True)}
    write_tensors(tmp_path, written, {}, 8)
    files = [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert sorted(os.listdir(tmp_path)) == [*files, INDEX]
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 31},
        "weight_map": dict(zip("abcde", [files[0], files[0], *files[1:]], strict=True)),
    }
    write_tensors(tmp_path / "one", written, {}, 31)
    assert os.listdir(tmp_path / "one") == [MODEL]
    write_tensors(tmp_path / "large", {"d": written["d"]}, {}, 1)
    assert os.listdir(tmp_path / "large") == [MODEL]


def test_the_given_metadata_keeps_the_format(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": np.zeros(1)}, {"format": "mlx", "base": "ü\n"})
    assert read_metadata(tmp_path / MODEL) == {"format": "pt", "base": "ü\n"}
    assert read_metadata(single(tmp_path / "none", raw({})) / MODEL) == {}


# --- the other library


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    written = some_of_all()
    write_tensors(tmp_path, written, {"step": "3"})
    found = dict(deserialize((tmp_path / MODEL).read_bytes()))
    assert set(found) == set(written)
    for name, array in written.items():
        assert found[name]["dtype"] == name.split(".")[0]
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()
    with safe_open(tmp_path / MODEL, "numpy") as file:
        assert file.metadata() == {"step": "3", "format": "pt"}
        assert file.get_tensor("F32.2").tobytes() == written["F32.2"].tobytes()


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    written = some_of_all()
    safetensors.numpy.save_file(written, tmp_path / MODEL, {"format": "np"})
    assert_same(open_tensors(tmp_path), written)
    assert read_metadata(tmp_path / MODEL) == {"format": "np"}


@pytest.mark.torch
def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    written = {name: value.numpy() for name, value in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    write_tensors(tmp_path, written, {}, 400)
    assert (tmp_path / INDEX).exists()
    found, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, value in found.state_dict().items():
        assert torch.equal(value, torch.tensor(written[name]))


# --- views


def test_tensors_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, some_of_all(), {})
    found = open_tensors(tmp_path)
    assert isinstance(found, Mapping)
    with pytest.raises(TypeError):
        found["F32.1"] = found["F32.1"]  # type: ignore[index]
    for array in found.values():
        assert not array.flags.writeable
        assert isinstance(root(array), mmap.mmap)
    assert len({id(root(array)) for array in found.values()}) == 1


def test_views_that_are_not_aligned_compute_right(tmp_path: Path) -> None:
    codes = [code for code in DTYPES if np.dtype(DTYPES[code]).itemsize > 1]
    position, header, wanted = 1, {"odd": entry(0, 1)}, {}
    for code in codes:
        wanted[code] = np.arange(6).reshape(2, 3).astype(DTYPES[code])
        header[code] = entry(position, position + wanted[code].nbytes, code, [2, 3])
        position += wanted[code].nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = open_tensors(single(tmp_path, raw(text, b"".join([b"\1", *map(np.ndarray.tobytes, wanted.values())]))))
    for code in codes:
        assert not found[code].flags.aligned
        assert isinstance(root(found[code]), mmap.mmap)
        np.testing.assert_array_equal(found[code], wanted[code])
        np.testing.assert_array_equal(found[code].astype(np.float32) @ np.ones(3, np.float32), [3, 12])
        np.testing.assert_array_equal(found[code].T + found[code].T, 2 * wanted[code].T)
        with jax.enable_x64(True):
            np.testing.assert_array_equal(jnp.asarray(found[code]), wanted[code])


def test_opening_takes_no_memory(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the memory in use is read where Linux tells it")

    def resident() -> int:
        return int(re.search(r"VmRSS:\s*(\d+) kB", status.read_text())[1]) * 1024

    size = 2**30
    with open(tmp_path / MODEL, "wb") as file:
        file.write(raw({"a": entry(0, size // 2, "F32", [2**17, 2**10]), "b": entry(size // 2, size)}))
        file.truncate(file.tell() + size)
    if (tmp_path / MODEL).stat().st_blocks * 512 > 2**20:
        pytest.skip("the disk has no sparse files")
    before = resident()
    found = open_tensors(tmp_path)
    assert found["a"].nbytes + found["b"].nbytes == size
    assert resident() - before < 16 * 2**20
    assert found["a"][-1, -1] + found["b"][-1] == 0


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "blobs", {"a": np.arange(3)}, {})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / MODEL).symlink_to(Path("..") / "blobs" / MODEL)
    assert_same(open_tensors(tmp_path / "snapshot"), {"a": np.arange(3)})
    (tmp_path / "blobs" / MODEL).unlink()
    assert (
        failure(open_tensors, tmp_path / "snapshot")
        == f"cannot read {tmp_path / 'snapshot' / MODEL}: No such file or directory; {AGAIN}"
    )


# --- bad files

LIST = [1] * 65
BAD_FILES = [
    (b"", f" has 0 bytes, fewer than any safetensors file: {AGAIN}"),
    (b"1234567", f" has 7 bytes, fewer than any safetensors file: {AGAIN}"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        " is no safetensors file but a pointer to one in Git LFS: download what it points to",
    ),
    (
        (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
        f" is no safetensors file (a header of 100000001 bytes): {AGAIN}",
    ),
    (b"\xff" * 8, f" is no safetensors file (a header of {2**64 - 1} bytes): {AGAIN}"),
    (raw({"a": entry(0, 0)})[:-1], f" is cut within its header, at least 1 bytes are missing: {AGAIN}"),
    (raw({"a": entry(0, 9)}, b"12345"), f" is cut, 4 of {len(raw({'a': entry(0, 9)})) + 9} bytes are missing: "),
    (raw({"a": entry(0, 9)}, bytes(11)), f" has 2 bytes after its last tensor: {AGAIN}"),
    (raw({}, b"1"), f" has 1 bytes after its last tensor: {AGAIN}"),
    (raw(b""), f" has a header that is not a JSON object: {AGAIN}"),
    (raw(b" {}"), f" has a header that is not a JSON object: {AGAIN}"),
    (raw([1]), f" has a header that is not a JSON object: {AGAIN}"),
    (raw(b'{"\xe9": 1}'), f" has a header that is not UTF-8 (byte 3): {AGAIN}"),
    (
        raw(b'{"a": 1'),
        " has a header that is not valid JSON (Expecting ',' delimiter: line 1 column 8 (char 7)): ",
    ),
    (raw(b"{}\0\0"), " has a header that is not valid JSON (Extra data: line 1 column 3 (char 2)): "),
    (raw(b'{"a": ' + b"[" * 10**5), " has a header that is not valid JSON ("),
    (raw(b'{"a": ' + b"1" * 5000 + b"}"), " has a header that is not valid JSON ("),
    (raw(b'{"a": NaN}'), f" has a header that is not valid JSON (NaN is no number): {AGAIN}"),
    (raw(b'{"a\\n": 1, "a\\n": 1}'), f' has a header that is not valid JSON (it has "a\\n" twice): {AGAIN}'),
    (
        raw(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'),
        f' has a header that is not valid JSON (it has "dtype" twice): {AGAIN}',
    ),
    (raw({"\ud83e": entry(0, 0)}), f" has half a surrogate pair in its header, which is no text: {AGAIN}"),
    (raw({"__metadata__": {"a": "\ud83e"}}), " has half a surrogate pair in its header, which is no text: "),
    (raw({"__metadata__": {"a": 1}}), f" has metadata that does not map text to text: {AGAIN}"),
    (raw({"__metadata__": None}), f" has metadata that does not map text to text: {AGAIN}"),
    (raw({"é\n": 3}), f', tensor "\\u00e9\\n": its entry is not a JSON object: {AGAIN}'),
    (raw({"a": {}}), f', tensor "a": no dtype: {AGAIN}'),
    (raw({"a": {"dtype": "U8"}}), f', tensor "a": no shape: {AGAIN}'),
    (raw({"a": {"dtype": "U8", "shape": []}}), f', tensor "a": no data_offsets: {AGAIN}'),
    (
        raw({"a": entry(0, 2, "F8_E4M3")}, bytes(2)),
        f', tensor "a": dtype "F8_E4M3" is not one of {ALL}: give weights of these',
    ),
    (raw({"a": entry(0, 2, ["F32"])}, bytes(2)), f', tensor "a": dtype ["F32"] is not text: {AGAIN}'),
    *[
        (
            raw({"a": entry(0, 1, shape=shape)}, b"1"),
            f', tensor "a": shape {json.dumps(shape)} is no list of at most 64 sizes: {AGAIN}',
        )
        for shape in (1, "1", [-1], [1.0], [True], [None], [[1]], [2**63], {})
    ],
    (raw({"a": entry(0, 1, shape=LIST)}, b"1"), f', tensor "a": shape {json.dumps(LIST)[:100]}... is no list of'),
    *[
        (
            raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": offsets}}, b"1"),
            f', tensor "a": data_offsets {json.dumps(offsets)} are not a begin and an end: {AGAIN}',
        )
        for offsets in ([1, 0], [-1, 0], [0], [0, 1, 1], [0, 1.0], [False, True], "01", None, [0, 2**63])
    ],
    (
        raw({"a": entry(0, 0, "F32", [0, 2**31, 2**31])}),
        f', tensor "a": shape [0, {2**31}, {2**31}] is too large: ',
    ),
    (raw({"a": entry(0, 3, "F32", [1])}, b"123"), ', tensor "a": 3 bytes where F32 of shape [1] takes 4: '),
    (raw({"a": entry(0, 1, shape=[0])}, b"1"), ', tensor "a": 1 bytes where U8 of shape [0] takes 0: '),
    (raw({"a": entry(0, 3), "b": entry(2, 5)}, bytes(5)), ', tensor "b": 1 bytes overlap tensor "a": '),
    (raw({"a": entry(0, 3), "b": entry(0, 3)}, bytes(3)), ', tensor "b": 3 bytes overlap tensor "a": '),
    (raw({"b": entry(4, 5), "a": entry(0, 3)}, bytes(5)), ', tensor "b": 1 unused bytes after tensor "a": '),
    (raw({"a": entry(2, 3)}, bytes(3)), f', tensor "a": 2 unused bytes after the header: {AGAIN}'),
    (raw({"a" * 200: 1}), f', tensor "{"a" * 99}...: its entry is not a JSON object: {AGAIN}'),
]


@pytest.mark.parametrize(("content", "fault"), BAD_FILES, ids=[fault[:40].strip(" ,:") for _, fault in BAD_FILES])
def test_bad_file(tmp_path: Path, content: bytes, fault: str) -> None:
    message = failure(open_tensors, single(tmp_path, content))
    whole = fault.endswith((AGAIN, "these", "points to"))
    assert message == f"{tmp_path / MODEL}{fault}" if whole else message.startswith(f"{tmp_path / MODEL}{fault}")
    assert failure(read_metadata, tmp_path / MODEL) == message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    assert failure(open_tensors, tmp_path) == f"cannot read {tmp_path / MODEL}: Is a directory; {AGAIN}"
    missing = tmp_path / "none.safetensors"
    assert failure(read_metadata, missing) == f"cannot read {missing}: No such file or directory; {AGAIN}"


def test_no_tensors_at_all_are_a_valid_file(tmp_path: Path) -> None:
    assert dict(open_tensors(single(tmp_path, raw(b"{}   ")))) == {}


VALID = raw(
    {"__metadata__": {"a": "b"}, "w": entry(0, 8, "F32", [2]), "v": entry(8, 12, "BF16", [1, 2])}, bytes(12)
)
mutations = st.lists(
    st.tuples(
        st.integers(0, len(VALID)),
        st.integers(0, 3),
        st.one_of(st.binary(max_size=3), st.sampled_from([b"0", b"9", b"-1", b'"', b"[", b"]", b"{", b"}", b","])),
    ),
    max_size=4,
)


@given(edits=mutations, fitting=st.booleans())
@settings(one_folder, max_examples=300)
def test_no_bytes_give_another_exception(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], fitting: bool
) -> None:
    content = VALID
    for position, removed, added in edits:
        content = content[:position] + added + content[position + removed :]
    if fitting:
        content = raw(content[8:-12], content[-12:])
    assert_valid_or_refused(tmp_path, content)


@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.sampled_from([*DTYPES, "U16", ""]),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]), inner),
            st.builds(entry, st.integers(0, 8), st.integers(0, 8), inner),
            st.builds(lambda begin, end: entry(begin, end), st.integers(0, 2), st.integers(0, 8)),
        ),
    ),
    size=st.integers(0, 8),
)
@settings(one_folder, max_examples=200)
def test_no_header_gives_another_exception(tmp_path: Path, header: object, size: int) -> None:
    assert_valid_or_refused(tmp_path, raw(header if isinstance(header, dict) else {"w": header}, bytes(size)))


def assert_valid_or_refused(tmp_path: Path, content: bytes) -> None:
    """What we take is taken by the other library, with the same content; what it does not take neither do we."""
    try:
        found = open_tensors(single(tmp_path, content))
    except InputError as error:
        message = str(error)
        assert str(tmp_path / MODEL) in message
        assert "\n" not in message
        return
    try:
        wanted = dict(deserialize(content))
    except SafetensorError as error:
        raise AssertionError(f"taken: {content!r}") from error
    assert set(found) == set(wanted)
    for name, array in found.items():
        assert array.tobytes() == bytes(wanted[name]["data"])
        assert list(array.shape) == wanted[name]["shape"]


# --- bad folders


def test_folders_without_weights(tmp_path: Path) -> None:
    missing, file = tmp_path / "none", tmp_path / "file"
    file.write_bytes(b"")
    advice = "give a folder of weights"
    assert (
        failure(open_tensors, missing) == f"cannot read the folder {missing}: No such file or directory; {advice}"
    )
    assert failure(open_tensors, file) == f"cannot read the folder {file}: Not a directory; {advice}"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    nothing = f"{folder} holds no weights: give a folder with {MODEL}, or with {INDEX} and its files"
    assert failure(open_tensors, folder) == nothing
    for name in ("a.bin", "b.PT", "c.pth", "d.ckpt", "pytorch_model.bin", "z.bin", "z.pt"):
        (folder / name).write_bytes(b"")
    assert failure(open_tensors, folder) == (
        f'{folder} has its weights in pickle files ("a.bin", "b.PT", "c.pth", "d.ckpt", "pytorch_model.bin" and 2 '
        "more), which are never opened because they can run code: convert them to safetensors"
    )
    (folder / "model-00001-of-00002.safetensors").write_bytes(raw({}))
    assert failure(open_tensors, folder) == (
        f'{folder} holds "model-00001-of-00002.safetensors", but neither {MODEL} nor {INDEX}: it is not whole, '
        + AGAIN
    )
    (folder / MODEL).write_bytes(raw({}))
    assert dict(open_tensors(folder)) == {}


def indexed(folder: Path, weight_map: object, **files: str) -> Path:
    """A folder with an index and files that hold the tensors of the given letters."""
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, letters in files.items():
        header = {letter: entry(n, n + 1) for n, letter in enumerate(letters)}
        (folder / f"{name}.safetensors").write_bytes(raw(header, letters.encode()))
    return folder


def test_index(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x="a", y="b", stray="abc")
    assert {name: array.tobytes() for name, array in open_tensors(folder).items()} == {"a": b"a", "b": b"b"}
    (folder / MODEL).write_bytes(raw({}))
    assert failure(open_tensors, folder) == (
        f"{folder} holds {MODEL} and {INDEX}, which does not list it: delete one of the two"
    )
    assert list(open_tensors(indexed(tmp_path / "2", {"a": MODEL}, model="a"))) == ["a"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff", "is not UTF-8 (byte 1)"),
        (b"[]", "is not a JSON object"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', 'is not valid JSON (it has "a" twice)'),
        (b"{}", "has no weight_map, the file of every tensor"),
        (b'{"weight_map": []}', "has no weight_map, the file of every tensor"),
        (b'{"weight_map": {}}', "has no weight_map, the file of every tensor"),
    ],
)
def test_bad_index(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / INDEX).write_bytes(content)
    assert failure(open_tensors, tmp_path) == f"{tmp_path / INDEX} {fault}: download it again"


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
    assert failure(open_tensors, folder) == (
        f'{folder / INDEX}, tensor "w\\n": {json.dumps(file)} is not the plain name of a safetensors file; '
        "download it again from a source that you trust"
    )


def test_index_names_missing_files(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {letter: f"{letter}.safetensors" for letter in "abcdefgh"}, h="h")
    assert failure(open_tensors, folder) == (
        f'{folder / INDEX} lists "a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors", '
        '"e.safetensors" and 2 more, missing in the folder: download what is missing'
    )
    long = indexed(tmp_path / "long", {"a": "x" * 300 + ".safetensors"})
    assert "x" * 99 in failure(open_tensors, long)


def test_index_and_files_differ(tmp_path: Path) -> None:
    where = {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors", "d": "x.safetensors"}
    folder = indexed(tmp_path, where, x="abe", y="bd")
    assert failure(open_tensors, folder) == (
        f'{folder / INDEX} and its files do not agree: tensor "b" is in "x.safetensors" and "y.safetensors", '
        'tensor "c" is not in "y.safetensors", tensor "d" is in "y.safetensors", not in "x.safetensors", '
        'tensor "e" of "x.safetensors" is not listed; download all of them again'
    )
    folder = indexed(tmp_path, where | dict.fromkeys("ijklm", "y.safetensors"), x="a", y="b")
    message = failure(open_tensors, folder)
    assert message.endswith(' tensor "k" is not in "y.safetensors" and 2 more; download all of them again')
    folder = indexed(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x="a", y="b")
    (folder / "y.safetensors").write_bytes(b"")
    assert failure(open_tensors, folder).startswith(f"{folder / 'y.safetensors'} has 0 bytes, ")


# --- writing


@pytest.mark.parametrize("shard_bytes", [10, 10**6])
def test_write_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    folder, good = tmp_path / "folder", {"a": np.zeros(9)}

    def refusal(tensors, metadata=None) -> str:
        return failure(write_tensors, folder, tensors, metadata or {}, shard_bytes)

    assert refusal({}) == f"there are no tensors to write to {folder}"
    for array, name in (
        (np.zeros(3, np.uint16), "uint16"),
        (np.zeros(3, complex), "complex128"),
        (np.array([None]), "object"),
        (np.array(["x"]), "<U1"),
        (jnp.zeros(3, jnp.float8_e4m3fn), "float8_e4m3fn"),
        (jnp.zeros(3, jnp.int4), "int4"),
        (jax.random.key(0), "key<fry>"),
    ):
        message = f'cannot write tensor "b\\n" to {folder}: {name} is not one of '
        assert refusal(good | {"b\n": array}).startswith(message)
    assert refusal(good | {"__metadata__": np.zeros(1)}) == (
        f'cannot write tensor "__metadata__" to {folder}: the format keeps this name for itself, give another'
    )
    no_text = f"cannot write to {folder}: a name or the metadata has half a surrogate pair, which is no text"
    assert refusal(good | {"\ud83e": np.zeros(1)}) == no_text
    assert refusal(good, {"a": "\ud83e"}) == no_text
    assert refusal(good, {"a": 3}) == f"the metadata for {folder} must map text to text"
    assert failure(write_tensors, folder, good, {}, 0) == "shard_bytes must be at least 1, got 0"
    monkeypatch.setattr(tensor_file, "MAX_HEADER", 100)
    assert refusal(good, {"a": "x" * 100}) == (
        f"cannot write to {folder}: names and metadata exceed 100 bytes, shorten them"
    )
    assert os.listdir(tmp_path) == []


def test_write_refuses_other_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "folder", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert failure(write_tensors, folder, {"a": np.zeros(1)}, {}) == (
            f"cannot write the weights to {folder}: {reason}; choose another folder"
        )


@pytest.mark.parametrize("held", [MODEL, INDEX, "model-00001-of-00002.safetensors", "adapter.safetensors"])
def test_weights_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    (tmp_path / held).write_bytes(b"old")
    steps(monkeypatch, lambda: pytest.fail("this should be known before anything is written"))
    assert failure(write_tensors, tmp_path, {"a": np.zeros(1)}, {}) == (
        f'{tmp_path} already holds weights ("{held}"): delete them or choose another folder'
    )
    assert os.listdir(tmp_path) == [held]
    assert (tmp_path / held).read_bytes() == b"old"


def test_other_files_stay_and_leftovers_go(tmp_path: Path) -> None:
    others = ["config.json", "pytorch_model.bin", ".other.safetensors.7.tmp", ".model.safetensors.tmp"]
    leftovers = [f".{MODEL}.7.tmp", f".{INDEX}.1234567.tmp", ".model-00001-of-00002.safetensors.7.tmp"]
    for name in others + leftovers:
        (tmp_path / name).write_bytes(b"")
    write_tensors(tmp_path, {"a": np.zeros(1)}, {})
    assert set(os.listdir(tmp_path)) == {MODEL, *others}


def steps(monkeypatch: pytest.MonkeyPatch, before, after=lambda: None) -> None:
    """Call a function before and another after every step of writing that the disk may see."""

    def around(function):
        def wrapped(*arguments):
            before()
            result = function(*arguments)
            after()
            return result

        return wrapped

    monkeypatch.setattr(module.os, "fsync", around(os.fsync))
    monkeypatch.setattr(module.os, "replace", around(os.replace))
    monkeypatch.setattr(module, "numbers_of", around(module.numbers_of))


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**6, 1), (16, 3)])
def test_killed_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, files: int
) -> None:
    """What the folder holds at every moment is what a killed process leaves: all, or none that is taken."""
    folder, written = tmp_path / "folder", {name: numbers(np.float32, (4,), ord(name)) for name in "abc"}
    moments: list[Path] = []

    def keep() -> None:
        moments.append(tmp_path / f"moment{len(moments)}")
        shutil.copytree(folder, moments[-1])

    with monkeypatch.context() as patch:
        steps(patch, keep, keep)
        write_tensors(folder, written, {}, shard_bytes)
    assert len(moments) == 2 * (3 + 2 * (files + (files > 1)))
    loaded, parts = [], 0
    for moment in moments:
        shown = [name for name in os.listdir(moment) if not name.startswith(".")]
        try:
            assert_same(open_tensors(moment), written)
            loaded.append(moment)
        except InputError as error:
            wanted = "holds no weights" if not shown else "neither model.safetensors nor"
            assert wanted in str(error)  # noqa: PT017 the last moments do not fail
            parts += bool(shown)
        if shown:
            # Also what is not whole is not overwritten.
            assert "already holds weights" in failure(write_tensors, moment, {"z": np.zeros(1)}, {})
        else:
            write_tensors(moment, {"z": np.zeros(1)}, {})
            assert os.listdir(moment) == [MODEL]
    assert loaded == moments[-1:]
    assert parts == (2 * 3 if files > 1 else 0)


@pytest.mark.parametrize("shard_bytes", [10**6, 16])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "no space"), "the disk is full: could not write the weights to {}; make room or "),
        (
            OSError(errno.EDQUOT, "quota"),
            "the disk is full: could not write the weights to {}; make room or choose",
        ),
        (OSError(errno.EIO, "broken"), "cannot write the weights to {}: broken; choose another folder"),
        (KeyboardInterrupt(), None),
        (RuntimeError("of the device"), None),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_failed_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, error, message, after: bool
) -> None:
    """Whatever fails, nothing new stays (what fails after the last step cannot be known to be written)."""
    folder, written = tmp_path / "folder", {name: numbers(np.float32, (4,), ord(name)) for name in "abc"}
    last = 3 + 2 * (1 if shard_bytes > 16 else 4)
    for moment in range(last - after):
        count = iter(range(last))

        def fail(count=count, moment=moment) -> None:
            if next(count) == moment:
                raise error

        with monkeypatch.context() as patch:
            steps(patch, *((lambda: None, fail) if after else (fail,)))
            with pytest.raises(InputError if message else type(error)) as caught:
                write_tensors(folder, written, {}, shard_bytes)
        if message:
            assert str(caught.value).startswith(message.format(folder))
        if after:
            # The file that was just named is not known to be: it has no index and is not taken.
            with pytest.raises(InputError):
                open_tensors(folder)
            shutil.rmtree(folder)
        else:
            assert os.listdir(folder) == []
    write_tensors(folder, written, {}, shard_bytes)
    assert_same(open_tensors(folder), written)


def test_another_process_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        steps(patch, lambda: (tmp_path / MODEL).write_bytes(b"theirs"))
        assert "already holds weights" in failure(write_tensors, tmp_path, {"a": np.zeros(1)}, {})
    assert os.listdir(tmp_path) == [MODEL]
    assert (tmp_path / MODEL).read_bytes() == b"theirs"


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = module.numbers_of

    def bytes_of(tensor):
        file = next(tmp_path.glob(".model*"))
        written.append(file.stat().st_size)
        return real(tensor)

    monkeypatch.setattr(module, "numbers_of", bytes_of)
    write_tensors(tmp_path, {name: np.zeros(10**5) for name in "abc"}, {})
    # Before a tensor is fetched, those before it are on their way to the disk.
    assert written[1] >= 8 * 10**5
    assert written[2] >= 16 * 10**5
