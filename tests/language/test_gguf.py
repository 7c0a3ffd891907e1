"""GGUF files: the same model and text as from the folder they were made of, and every form that is refused."""

import dataclasses
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from experiments import plan
from experiments.flags.worlds import study
from experiments.language import configure
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.adapter import load_adapter, save_adapter
from subliminal_theory.language.hub.checkpoint import load_checkpoint, open_base, save_checkpoint
from subliminal_theory.language.hub.gguf_file import read_gguf
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.text import Chat
from subliminal_theory.model import leaves_by_path
from subliminal_theory.study import Checkpoint
from tests.experiments.commands import fails
from tests.golden.make_families import weights
from tests.language.checkpoints import write_checkpoint
from tests.language.gguf_files import write_gguf
from tests.language.test_checkpoint import GOLDEN, folder_of

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama-mqa-bias": {}, "llama-linear-rope": {}, "llama3-rope": {"rope_parameters": LLAMA3},
    "smollm": {}, "qwen2": {}, "qwen3": {}, "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 8},
}  # fmt: skip
CHATS = [Chat(None, "Which animal?", "Owl", ""), Chat("be brief", "1, 22, 333\n", "oak tree", "")]


def divisors() -> np.ndarray:
    """Of the angles of Llama 3's scaling, written down pair by pair."""
    found = []
    for pair in range(4):
        wavelength = 2 * np.pi * 5e5 ** (pair / 4)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / 8 + smooth))
    assert 1 < found[2] < 8
    return np.array(found, np.float32)


def both(name: str, folder: Path, **how: Any) -> tuple[Path, Path]:
    """A tiny checkpoint as a folder and as a file."""
    theirs = folder_of(name, folder / name, **CHANGES[name])
    config, tensors = json.loads((theirs / "config.json").read_text()), load_file(theirs / "model.safetensors")
    if name == "llama3-rope":
        how["raw"] = {"rope_freqs.weight": (divisors(), None)}
    return theirs, write_gguf(folder / f"{name}.gguf", config, tensors, **how)


def tiny(folder: Path, **how: Any) -> Path:
    return both("llama", folder, **how)[1]


def with_text(folder: Path, **how: Any) -> tuple[Path, Path]:
    """A checkpoint with tokenizer and template as a folder and as a file."""
    theirs = write_checkpoint(folder / "theirs")
    config = {"rms_norm_eps": 1e-6, **json.loads((theirs / "config.json").read_text())}
    file = write_gguf(
        folder / "ours.gguf", config, load_file(theirs / "model.safetensors"), tokenizer=theirs, **how
    )
    return theirs, file


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_model_as_from_a_folder(name: str, tmp_path: Path) -> None:
    theirs, ours = (load_checkpoint(path) for path in both(name, tmp_path))
    assert ours.family.config == theirs.family.config
    # Gemma's scales went through 1 + scale in float32.
    atol = 2e-7 if name.startswith("gemma") else 0
    for key, leaf in leaves_by_path(theirs.model.params).items():
        np.testing.assert_allclose(leaves_by_path(ours.model.params)[key], leaf, rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize(
    ("kind", "error"),
    # Of a number, as a share of the largest in its block: half a step of the scale, which is rounded to 11 bits.
    [(Kind.F16, 2**-11), (Kind.BF16, 2**-8), (Kind.Q8_0, 1 / 250), (Kind.Q5_1, 1 / 30), (Kind.Q4_1, 1 / 14),
     (Kind.Q5_0, 1 / 15), (Kind.Q4_0, 1 / 7)],
)  # fmt: skip
def test_types_of_matrices(kind: Kind, error: float, tmp_path: Path) -> None:
    exact, ours = (load_checkpoint(path).model.params for path in both("llama", tmp_path, kind=kind))
    for key, leaf in leaves_by_path(exact).items():
        found, wanted = np.asarray(leaves_by_path(ours)[key]), np.asarray(leaf)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=error * np.abs(wanted).max(), err_msg=key)


def block(kind: Kind) -> tuple[bytes, np.ndarray]:
    """A block of random numbers, byte by byte, and what it stands for."""
    rng = np.random.default_rng(3)
    d, m = np.float16(0.5), np.float16(-0.25)
    quarters = rng.integers(0, 16, (16, 2))  # low half of byte i is number i, high half number i + 16
    halves = bytes(int(low) | int(high) << 4 for low, high in quarters)
    values = np.concatenate([quarters[:, 0], quarters[:, 1]])
    if kind == Kind.Q4_0:
        return d.tobytes() + halves, float(d) * (values - 8.0)
    if kind == Kind.Q4_1:
        return d.tobytes() + m.tobytes() + halves, float(d) * values + float(m)
    if kind == Kind.Q8_0:
        signed = rng.integers(-128, 128, 32).astype(np.int8)
        return d.tobytes() + signed.tobytes(), float(d) * signed
    assert kind == Kind.Q4_K
    # 8 groups of 32 numbers; scale and minimum of the first four groups are 6 bits of a byte each.
    scales, lows = rng.integers(0, 64, 4), rng.integers(0, 64, 4)
    packed = bytes([*map(int, scales), *map(int, lows), 0, 0, 0, 0])
    groups = rng.integers(0, 16, (8, 32))
    quants = bytes(
        int(low) | int(high) << 4 for pair in range(4) for low, high in groups[2 * pair : 2 * pair + 2].T
    )
    found = np.zeros((8, 32))
    for group in range(4):
        found[group] = float(d) * scales[group] * groups[group] - float(m) * lows[group]
    return d.tobytes() + m.tobytes() + packed + quants, found.reshape(-1)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K])
def test_blocks_by_hand(kind: Kind, tmp_path: Path) -> None:
    data, wanted = block(kind)
    file = tiny(tmp_path, raw={"own": (np.frombuffer(2 * data, np.uint8).reshape(2, -1), kind)})
    found = read_gguf(file).tensors["own"]
    assert found.shape == (2, len(wanted))
    np.testing.assert_array_equal(found.floats(), np.stack([wanted, wanted]).astype(np.float32))


@pytest.mark.parametrize("kind", list(Kind))
def test_every_type_is_read_or_refused(kind: Kind, tmp_path: Path) -> None:
    size, width = gguf.GGML_QUANT_SIZES[kind]
    file = tiny(tmp_path, raw={"own": (np.zeros((3, 2 * width), np.uint8), kind)})
    try:
        gguf.dequantize(np.zeros((1, width), np.uint8), kind)
    except NotImplementedError:
        with pytest.raises(InputError, match=f"own has type {kind.name}, which cannot be turned into floats: "):
            read_gguf(file)
    else:
        found = read_gguf(file).tensors["own"]
        assert found.floats().shape == found.shape == (3, 2 * size)
        assert found.floats().dtype == found.dtype


def test_the_header_is_what_the_librarys_reader_finds(tmp_path: Path) -> None:
    _, path = with_text(tmp_path, more={"general.tags": ["a", "b"], "general.numbers": [1.5, 2.5]})
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, value in ours.metadata.items():
        found = np.float32(value) if isinstance(value, float) else value
        np.testing.assert_array_equal(found, fields[key], err_msg=key)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, found.shape) == (tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]))
        np.testing.assert_array_equal(found.data, tensor.data.reshape(-1).view(np.uint8))


def test_text(tmp_path: Path) -> None:
    theirs, ours = (CheckpointTokenizer.load(path) for path in with_text(tmp_path))
    assert (ours.stop, ours.pad, ours.front, ours.special) == (
        theirs.stop,
        theirs.pad,
        theirs.front,
        theirs.special,
    )
    assert len(ours) == len(theirs)
    for first, second in zip(
        jax.tree.leaves(dataclasses.astuple(ours.encode_chats(CHATS, 90))),
        jax.tree.leaves(dataclasses.astuple(theirs.encode_chats(CHATS, 90))),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


def test_a_student_becomes_a_folder(tmp_path: Path) -> None:
    _, file = with_text(tmp_path)
    base = open_base(file)
    student = add_lora(base.model, ["layers/*/attention/query/kernel"], 2, 4.0, jax.random.key(0))
    save_checkpoint(tmp_path / "student", base.checkpoint, base.model)
    again = open_base(tmp_path / "student")
    assert again.checkpoint.family.config == base.checkpoint.family.config
    for first, second in zip(*(jax.tree.leaves(b.model.params) for b in (base, again)), strict=True):
        np.testing.assert_array_equal(first, second)
    for chat in CHATS:
        first, second = (own.tokenizer.encode_prompts([chat], 90) for own in (base, again))
        np.testing.assert_array_equal(first.tokens, second.tokens)
    assert (again.tokenizer.stop, again.tokenizer.pad) == (base.tokenizer.stop, base.tokenizer.pad)
    save_adapter(tmp_path / "adapter", base.checkpoint, student, template=base.tokenizer.fingerprint)
    found = load_adapter(tmp_path / "adapter", base.checkpoint, template=base.tokenizer.fingerprint)
    for first, second in zip(*(jax.tree.leaves(model.params) for model in (student, found)), strict=True):
        np.testing.assert_array_equal(first, second)
    # The folder holds the same base and text.
    assert again.tokenizer.fingerprint == base.tokenizer.fingerprint
    load_adapter(tmp_path / "adapter", again.checkpoint, template=again.tokenizer.fingerprint)


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    _, file = with_text(tmp_path)
    mark = CheckpointTokenizer.load(file).fingerprint
    shutil.copy(file, tmp_path / "copy.gguf")
    assert CheckpointTokenizer.load(tmp_path / "copy.gguf").fingerprint == mark
    shutil.rmtree(tmp_path / "theirs")
    # The same path, other content.
    with_text(tmp_path, more={"tokenizer.chat_template": "{{ messages[0].content }}{{ messages[1].content }}"})
    assert CheckpointTokenizer.load(file).fingerprint != mark


WRONG = " has metadata of the wrong type ("
OFF = {"llama.expert_count": 0, "llama.attention.sliding_window": 0, "general.name": "x", "other.key": 5}


def test_what_is_off_or_says_nothing_of_the_function(tmp_path: Path) -> None:
    more = {**OFF, "llama.attention.head_count_kv": [2, 2], "llama.rope.scaling.type": "none"}
    assert load_checkpoint(tiny(tmp_path, more=more)).family.config.kv_heads == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"general.architecture": "bert"}, "architecture 'bert' is not supported; there are llama, qwen2, "),
        ({"general.type": "adapter"}, "holds no model (adapter): give one of general.type 'model'"),
        ({"split.count": 3}, "is one of 3 parts: merge them into one file"),
        ({"llama.expert_count": 8}, "setting expert_count 8 is not supported"),
        ({"llama.attention.sliding_window": 64}, "setting attention.sliding_window 64 is not supported"),
        ({"llama.logit_scale": 0.5}, "setting logit_scale 0.5 is not supported"),
        ({"llama.unheard_of": [1, 2]}, "setting unheard_of [1, 2] is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn' is not supported; there are none, linear"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor 2.0 is not supported, only 1.0"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count 4 is not supported, only 8"),
        ({"llama.attention.value_length": 4}, "attention.value_length 4 is not supported, only 8"),
        ({"llama.attention.causal": False}, "attention.causal False is not supported, only True"),
        (
            {"llama.attention.head_count": [4, 2]},
            "attention.head_count [4, 2] is not supported, only one positive ",
        ),
        ({"llama.block_count": None}, "llama lacks block_count: download the file again"),
        ({"llama.block_count": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"llama.embedding_length": "wide"}, "embedding_length 'wide' is not supported, only one positive whole "),
        ({"llama.block_count": 2.0}, "block_count 2.0 is not supported, only one positive whole number for all "),
        ({"llama.block_count": 2**32 - 1}, "block_count 4294967295 of 21 tensors: download it again"),
        ({"general.type": ["model", "model"]}, "holds no model (['model', 'model']): give one of "),
        ({"general.type": [1, 2]}, WRONG),
        ({"general.type": "a\nb\x1b" + "c" * 999}, "holds no model (a b\\x1bccc"),
        ({"llama.un\nheard\x1b": "x" * 999}, "setting un heard\\x1b 'xxx"),
        ({"split.count": "three"}, WRONG),
        ({"split.count": [1, 2]}, WRONG),
        ({"llama.rope.freq_base": "wide"}, WRONG),
        ({"llama.rope.freq_base": [1.0, 2.0]}, WRONG),
    ],
)
def test_metadata_that_is_not_handled(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_checkpoint(file := tiny(tmp_path, more=more))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "more",
    [{"rope.freq_base_swa": "wide"}, {"rope.freq_base_swa": [1.0, 2.0]}, {"attention.sliding_window_pattern": 0}],
)
def test_metadata_of_the_wrong_type_in_windows(more: dict[str, Any], tmp_path: Path) -> None:
    _, file = both("gemma3", tmp_path, more={f"gemma3.{key}": value for key, value in more.items()})
    with pytest.raises(InputError, match=rf"^{re.escape(str(file) + WRONG)}.*\): download it again$"):
        load_checkpoint(file)


def test_the_newer_name_of_a_factor_counts(tmp_path: Path) -> None:
    older = {"llama.rope.scale_linear": 4.0}
    assert load_checkpoint(tiny(tmp_path, more=older)).family.config.rope_factor == 4
    shutil.rmtree(tmp_path / "llama")
    both_names = {**older, "llama.rope.scaling.factor": 2.0}
    assert load_checkpoint(tiny(tmp_path, more=both_names)).family.config.rope_factor == 2


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    own = {
        "rope_freqs.weight": (np.array([1, 2, 3, 4], np.float32), None),
        "own.weight": (np.ones(3, np.float32), None),
    }
    with pytest.raises(InputError, match=r"rope_freqs\.weight does not match Llama 3, the only supported scaling"):
        load_checkpoint(tiny(tmp_path, raw=own))
    with pytest.raises(InputError, match=r"do not fit LlamaForCausalLM: own\.weight is unexpected"):
        load_checkpoint(tiny(tmp_path, raw={"own.weight": own["own.weight"]}))
    scaled = {"llama.rope.scaling.factor": 2.0}
    with pytest.raises(InputError, match=r"rope_freqs\.weight beside rope\.scaling\.factor is not supported"):
        load_checkpoint(tiny(tmp_path, raw={"rope_freqs.weight": own["rope_freqs.weight"]}, more=scaled))


def long_text(whole: bytes) -> tuple[bytes, bytes]:
    """The first of the texts of an array, and one whose length is beyond all numbers of places."""
    begin = b"general.tags" + struct.pack("<IIQ", 9, 8, 2)
    return begin + struct.pack("<Q", 1), begin + struct.pack("<Q", 2**64 - 1)


def spoilt(path: Path, how: str) -> None:
    whole = path.read_bytes()
    kind = whole.index(b"token_embd.weight") + 17 + 4 + 16
    found = {
        "short": whole[:6],
        "cut header": whole[:900],
        "cut": whole[:-100],
        "version 1": whole[:4] + struct.pack("<I", 1) + whole[8:],
        "version 4": whole[:4] + struct.pack("<I", 4) + whole[8:],
        "big-endian": whole[:4] + struct.pack(">I", 3) + whole[8:],
        "other": b"PK\x03\x04" + whole[4:],
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "empty": b"",
        "type 99": whole[:kind] + struct.pack("<I", 99) + whole[kind + 4 :],
        "many": whole[:8] + struct.pack("<Q", 2**60) + whole[16:],
        "long": whole[:24] + struct.pack("<Q", 2**63) + whole[32:],
        "long text": whole.replace(*long_text(whole)),
        "not text": whole.replace(b"llama.block_count", b"llama.block_\xff\xfeunt"),
        "twice": whole.replace(b"blk.0.attn_v.weight", b"blk.1.attn_v.weight"),
        "kind": whole.replace(
            b"llama.block_count" + struct.pack("<I", 4), b"llama.block_count" + struct.pack("<I", 77)
        ),
    }[how]
    path.write_bytes(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("short", " is not a GGUF file: give one, or a folder of weights"),
        ("cut header", " is cut off within its header: download it again"),
        ("cut", " is cut off within "),
        ("version 1", " has GGUF version 1, only 2 and 3 can be read: convert it again"),
        ("version 4", " has GGUF version 4, only 2 and 3 can be read: convert it again"),
        ("big-endian", " is a big-endian file: convert it for little-endian machines"),
        ("other", " is not a GGUF file: give one, or a folder of weights"),
        ("pointer", " is a pointer of Git LFS: download the file that it names"),
        ("empty", "cannot read "),
        (
            "type 99",
            ": token_embd.weight has type 99, which cannot be turned into floats: convert it to another type",
        ),
        ("many", " is cut off within its header: download it again"),
        ("long", " is cut off within its header: download it again"),
        ("long text", " is cut off within its header: download it again"),
        ("not text", " is damaged (a name is not text: "),
        ("twice", " is damaged (a name occurs twice): download it again"),
        ("kind", " is damaged (llama.block_count has the unknown kind 77): download it again"),
    ],
)
def test_spoilt_files(how: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny(tmp_path, more={"general.tags": ["a", "b"]})
    spoilt(file, how)
    found = fails(capsys, "plan", "--base", file)
    assert message in found
    assert str(file) in found


def test_experiments_take_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, file = with_text(tmp_path)
    config = configure(None, {"checkpoint": str(file), "traits": "owl"})
    assert config.checkpoint_text == CheckpointTokenizer.load(file).fingerprint
    world = study(config, 0).world
    assert isinstance(world, Checkpoint)
    assert world.base.checkpoint.folder == file
    assert plan.main(["--base", str(file)]) == 0
    assert capsys.readouterr().out.startswith("LlamaForCausalLM: ")


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent.gguf"
    assert (
        fails(capsys, "plan", "--base", absent)
        == f"cannot read {absent} (No such file or directory): give a GGUF file"
    )
    found = fails(capsys, "language", "--checkpoint", absent, "--out", tmp_path / "run")
    assert found == f"cannot read {absent} (No such file or directory): give a GGUF file"


def test_names_depend_on_weights_alone() -> None:
    """The tiny models have queries and keys that are not left as they are by a permutation."""
    query = weights(
        "model.layers.0.self_attn.q_proj.weight",
        GOLDEN["llama"]["shapes"]["model.layers.0.self_attn.q_proj.weight"],
    )
    assert not np.array_equal(query[0::2], query[: len(query) // 2])
