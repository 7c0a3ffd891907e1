"""Checkpoints of every family against stored logits, in old spellings, and in every broken form."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.checkpoint import load_checkpoint, save_checkpoint
from subliminal_theory.language.hub.families import read_family
from subliminal_theory.language.model.lora import add_lora, merge_lora
from subliminal_theory.language.model.transformer import Text
from tests.golden.make_families import FILE, PADDING, TOKENS, weights

GOLDEN = json.loads(FILE.read_text())
run = jax.jit(lambda model, text: model(text))
TEXT = Text(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(PADDING, jnp.int32), last=1)


def folder_of(name: str, folder: Path, dtype: Any = np.float32, **changes: Any) -> Path:
    """The tiny checkpoint of a family; `changes` are of its config.json."""
    folder.mkdir(exist_ok=True)
    golden = GOLDEN[name]
    (folder / "config.json").write_text(json.dumps({**golden["config"], **changes}))
    tensors = {key: weights(key, shape).astype(dtype) for key, shape in golden["shapes"].items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def retell(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    model = load_checkpoint(folder_of(name, tmp_path)).model
    logits, stored = np.asarray(run(model, TEXT))[:, 0], np.array(GOLDEN[name]["logits"])
    np.testing.assert_allclose(logits, stored, atol=1e-5 * np.abs(stored).max() + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2"])
def test_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    """Through bfloat16 too: what is read is what was stored, and is written back as it was."""
    theirs = folder_of(name, tmp_path / "theirs", jnp.bfloat16)
    checkpoint = load_checkpoint(theirs, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.model)} == {np.dtype(jnp.bfloat16)}
    save_checkpoint(tmp_path / "ours", checkpoint, checkpoint.model)
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key].view(np.uint16), after[key].view(np.uint16))
    assert read_family(tmp_path / "ours").config == checkpoint.family.config
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merged_factors_are_saved(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder_of("llama", tmp_path / "theirs"))
    adapted = add_lora(checkpoint.model, ["layers/*/attention/*/kernel"], 2, 4.0, jax.random.key(0))
    adapted = adapted.with_params(jax.tree.map(lambda leaf: leaf + 0.1, adapted.params))
    save_checkpoint(tmp_path / "ours", checkpoint, adapted)
    again = load_checkpoint(tmp_path / "ours").model
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(merge_lora(adapted)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(run(again, TEXT) - run(checkpoint.model, TEXT)).max() > 0.01


def test_text_files_travel(tmp_path: Path) -> None:
    theirs = folder_of("llama", tmp_path / "theirs")
    (theirs / "tokenizer.json").write_text("{}")
    checkpoint = load_checkpoint(theirs)
    save_checkpoint(tmp_path / "ours", checkpoint, checkpoint.model)
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(InputError, match="is there already"):
        save_checkpoint(tmp_path / "ours", checkpoint, checkpoint.model)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """At any of its steps. A killed process leaves a folder of another name, which the next save removes."""
    theirs, ours = folder_of("llama", tmp_path / "theirs"), tmp_path / "ours"
    (theirs / "tokenizer.json").write_text("{}")
    checkpoint, real = load_checkpoint(theirs), getattr(os, call)
    for last in range(3 + (call == "replace")):
        calls = iter(range(9))

        def fail(*given: Any, last: int = last, calls: Any = calls) -> None:
            if next(calls) == last:
                raise OSError(errno.ENOSPC, "no room")
            real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(InputError, match=r"^the disk is full: could not write "):
                save_checkpoint(ours, checkpoint, checkpoint.model)
        assert os.listdir(tmp_path) == ["theirs"]
    shutil.copytree(theirs, tmp_path / ".ours.tmp")
    (tmp_path / ".ours.tmp" / "more").touch()
    save_checkpoint(ours, checkpoint, checkpoint.model)
    assert sorted(os.listdir(ours)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]


def test_another_shape_is_not_saved(tmp_path: Path) -> None:
    first, second = (load_checkpoint(folder_of(name, tmp_path / name)) for name in ("llama", "qwen3"))
    with pytest.raises(InputError, match=r"^save_checkpoint: the model does not have the shape of .*llama$"):
        save_checkpoint(tmp_path / "ours", first, second.model)
    assert not (tmp_path / "ours").exists()


def test_bare_models_and_stored_tables(tmp_path: Path) -> None:
    """Older files leave out the first part of the names, and hold masks and frequencies."""
    folder = folder_of("gpt2", tmp_path)
    expected = run(load_checkpoint(folder).model, TEXT)
    bare = {
        key.removeprefix("transformer."): value for key, value in load_file(folder / "model.safetensors").items()
    }
    retell(folder, {**bare, "h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "h.0.attn.masked_bias": np.zeros(())})
    np.testing.assert_array_equal(run(load_checkpoint(folder).model, TEXT), expected)


def test_a_tied_matrix_that_is_stored_twice(tmp_path: Path) -> None:
    folder = folder_of("qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    retell(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert "head" not in load_checkpoint(folder).model.params
    retell(folder, {**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
    with pytest.raises(InputError, match=r"lm_head\.weight is unexpected$"):
        load_checkpoint(folder)


def test_every_fault_is_in_one_error(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["other"] = tensors.pop("model.norm.weight")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:40]
    retell(folder, tensors)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.int8)
    retell(folder, tensors)
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder)
    assert str(caught.value) == (
        f"{folder}: the tensors do not fit LlamaForCausalLM: model.norm.weight is missing; other is unexpected; "
        "model.embed_tokens.weight is [40, 32], not [50, 32]; "
        "model.layers.0.mlp.up_proj.weight is int8, not floating"
    )


def test_placement(tmp_path: Path) -> None:
    seen = {}

    def place(name: str, shape: tuple[int, ...]) -> jax.Device:
        seen[name] = shape
        return jax.devices()[0]

    model = load_checkpoint(folder_of("llama", tmp_path), placement=place).model
    assert seen["layers/*/mlp/gate/kernel"] == (2, 32, 48)
    assert len(seen) == len(jax.tree.leaves(model))
    with pytest.raises(InputError, match=r"^dtype 'int8' is unknown; there are float32, bfloat16, float16$"):
        load_checkpoint(tmp_path, "int8")


OLD = {
    "llama3-rope": {
        "rope_parameters": None, "rope_theta": 500.0,
        "rope_scaling": {
            "type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama": {"rope_parameters": None, "num_key_value_heads": 2, "torch_dtype": "bfloat16", "head_dim": None},
    "gemma2": {"rope_parameters": None, "rope_theta": 10_000.0, "layer_types": None, "hidden_act": "gelu"},
    "gemma3": {
        "rope_parameters": None, "rope_theta": 1000.0, "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "neox": {"rope_parameters": None, "rotary_emb_base": 100, "rotary_pct": 0.25},
    "qwen2": {"rope_parameters": None, "rope_theta": 10_000.0, "layer_types": None, "sliding_window": 4},
    "qwen2-window": {"rope_parameters": None, "layer_types": None},
    "mistral-window": {"rope_parameters": None, "rope_theta": 10_000.0},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_spellings(name: str, tmp_path: Path) -> None:
    new = read_family(folder_of(name, tmp_path / "new")).config
    assert read_family(folder_of(name, tmp_path / "old", **OLD[name])).config == new


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"architectures": None, "model_type": None},
            r"names no architecture: add architectures, one of Gemma2ForCausalLM, ",
        ),
        ("llama", {"architectures": None, "model_type": "bert"}, "names no architecture: "),
        (
            "llama",
            {"model_type": "mistral"},
            "model_type 'mistral' does not match LlamaForCausalLM, whose type is 'llama': take",
        ),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequ.* supported"),
        ("llama", {"architectures": ["A", "B"]}, "names no architecture: "),
        ("llama", {"architectures": ["BertModel"]}, "architecture 'BertModel' is not supported; there are Gemma2"),
        ("llama", {"hidden_size": None}, "lacks hidden_size: take the config.json that belongs to the weights"),
        ("llama", {"hidden_size": "32"}, "has a setting of the wrong type "),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "has a setting of the wrong type "),
        ("llama", {"layer_types": 5}, "has a setting of the wrong type "),
        ("llama", {"layer_types": [["a"]]}, "has a setting of the wrong type "),
        (
            "llama",
            {"num_hidden_layers": 2**40},
            "num_hidden_layers 1099511627776 is not supported, only up to 10000",
        ),
        ("gemma2", {"num_hidden_layers": 2**40, "layer_types": None}, "is not supported, only up to 10000"),
        ("gpt2", {"n_layer": 2**40}, "n_layer 1099511627776 is not supported, only up to 10000"),
        ("llama", {"hidden_act": "a\x1b" + "b" * 999}, r"hidden_act 'a\\x1bb+ \.\.\. is not supported"),
        ("llama", {"vocab_size": "9" * 999}, r"vocabulary must be a positive integer, got '9+ \.\.\.$"),
        ("llama", {"vocab_size": -1}, "TransformerConfig: vocabulary must be a positive integer, got -1"),
        ("llama", {"num_key_value_heads": 3}, "TransformerConfig: heads must be a multiple of kv_heads"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            r"setting quantization_config \{'bits': 4\} is not ",
        ),
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported; there are silu, "),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rotary scaling 'yarn' is not ",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rotary parameters lacks factor"),
        (
            "llama",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "partial_rotary_factor 0.5 is not supported, only 1",
        ),
        ("neox", {"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, "factor 0.5 is not the share of a head 0.25"),
        ("neox", {"rope_theta": 7.0}, "rope_theta 7.0 is not the base 100.0: delete the wrong one"),
        (
            "mistral",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "only 'full_attention' in all layers",
        ),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is off: give its len"),
        ("gemma2", {"sliding_window": None}, "layers have windows, but sliding_window is off: give its length"),
        (
            "gemma3",
            {"layer_types": None, "_sliding_window_pattern": 2},
            "_sliding_window_pattern 2 is not sliding_window_pattern 6: delete the wrong one",
        ),
        ("llama", {"is_causal": False}, "is_causal False is not supported, only True"),
        (
            "llama",
            {"per_layer_config": {"0": {"head_dim": 4}}},
            "setting per_layer_config .* is not supported: lay",
        ),
        ("llama", {"pruned_heads": {"0": [1]}}, "setting pruned_heads .* is not supported: layers without some"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported, only False"),
        ("gpt2", {"hidden_size": 48}, "n_embd 32 is not hidden_size 48: delete the wrong one"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "type 'linear_attention' are not supp"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False is not supported, only True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supp"),
    ],
)
def test_settings_that_are_not_handled(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_family(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent is not a folder: give the folder of a checkpoint "):
        read_family(tmp_path / "absent")
    with pytest.raises(InputError, match=r"^cannot read .*config\.json \(No such file .*\): give a folder"):
        read_family(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON \(.*\): download or write it again$"):
        read_family(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json holds no JSON object: download or write it again$"):
        read_family(tmp_path)


def test_settings_of_others_are_let_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What trainers and converters leave changes nothing; names that nobody knows are told in one line, once."""
    plain = read_family(folder_of("llama", tmp_path / "plain")).config
    left = {
        "is_llama_config": True, "rope_interleaved": False, "unsloth_fixed": True, "unsloth_version": "2026.4.2",
        "transformers.js_config": {"kv_cache_dtype": {}}, "neftune_noise_alpha": 5.0, "max_length": 512,
        "auto_map": {"AutoConfig": "configuration_x.X"}, "_num_labels": 1, "quantization_config": None,
        "tokenizer_class": "X", "layer_types": ["full_attention"] * 2, "_attn_implementation": "sdpa",
    }  # fmt: skip
    assert read_family(folder_of("llama", tmp_path / "known", **left)).config == plain
    assert caplog.messages == []
    folder = folder_of("llama", tmp_path / "more", **left, trainer={"a": 1}, no_effect=3, off=0)
    assert (read_family(folder).config, read_family(folder).config) == (plain, plain)
    assert caplog.messages == [
        f"{folder / 'config.json'}: ignored, not settings of this architecture: no_effect, trainer"
    ]


@pytest.mark.parametrize("architectures", [None, [], ["LlamaModel"]])
def test_the_type_stands_in_for_the_architecture(architectures: Any, tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path, architectures=architectures, model_type="llama")
    assert read_family(folder).architecture == "LlamaForCausalLM"


def test_defaults_of_the_family(tmp_path: Path) -> None:
    """Where a file is silent; null switches off."""
    golden = {name: dict(GOLDEN[name]["config"]) for name in ("gemma2", "mistral", "gemma3", "qwen3")}
    for config in golden.values():
        for name in (
            "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "head_dim",
            "num_key_value_heads", "max_position_embeddings",
        ):  # fmt: skip
            config.pop(name, None)
    golden["gemma3"] |= {"num_hidden_layers": 6, "layer_types": None}
    golden["mistral"]["num_attention_heads"] = 16
    golden["qwen3"]["num_attention_heads"] = 32
    read = {}
    for name, config in golden.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        read[name] = read_family(tmp_path).config
    caps = {name: (config.attention_cap, config.logit_cap) for name, config in read.items()}
    none = (None, None)
    assert caps == {"gemma2": (50.0, 30.0), "mistral": none, "gemma3": none, "qwen3": none}
    windows = {name: config.window for name, config in read.items()}
    assert windows == {"gemma2": 4096, "mistral": 4096, "gemma3": 4096, "qwen3": None}
    assert read["gemma3"].windowed == (True,) * 5 + (False,)
    widths = {name: (config.kv_heads, config.head_width) for name, config in read.items()}
    assert widths == {"gemma2": (4, 256), "mistral": (8, 2), "gemma3": (4, 256), "qwen3": (32, 128)}
    contexts = {name: config.context for name, config in read.items()}
    assert contexts == {"gemma2": 8192, "mistral": 131_072, "gemma3": 131_072, "qwen3": 32_768}
    (tmp_path / "config.json").write_text(json.dumps({**golden["mistral"], "sliding_window": None}))
    assert read_family(tmp_path).config.window is None


def test_numbers_without_scales_are_refused(tmp_path: Path) -> None:
    """Integers are quantized weights: without their scales they are not the model."""
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for dtype in (np.int8, np.uint8, np.int32, bool):
        retell(folder, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
        with pytest.raises(InputError, match=r"model\.embed_tokens\.weight is u?(int\d+|bool), not floating"):
            load_checkpoint(folder)
