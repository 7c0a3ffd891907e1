"""Spellings of config.json through the years, against what `transformers` makes of the same file."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from subliminal_theory.language.hub.checkpoint import load_checkpoint
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.transformer import Text
from tests.language.peers import logits_of, peer_of

pytestmark = pytest.mark.torch
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))
run = jax.jit(lambda model, text: model(text))

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
MANY = {"num_attention_heads": 32, "hidden_size": 128}
NEOX = {"hidden_size": 64}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
GEMMA = {"head_dim": 8, "num_key_value_heads": 2, "num_hidden_layers": 7}
SLIDING, FULL = "sliding_attention", "full_attention"
LEFT: dict[str, Any] = {
    "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"},
    "unsloth_fixed": True, "unsloth_version": "2026.4.2", "_num_labels": 1, "neftune_noise_alpha": 5.0,
    "max_length": 512, "do_sample": True, "temperature": 0.7, "gradient_checkpointing": True,
    "quantization_config": None, "attn_implementation": None, "head_dim": None, "pretraining_tp": 1,
    "tokenizer_class": "X", "num_labels": 3, "some_trainers_own": {"a": 1},
}  # fmt: skip
WITHOUT = "without"  # a setting that is taken out

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", LEFT),
    ("llama", {"num_key_value_heads": None, "rope_theta": 500.0, "rope_scaling": None}),
    ("llama", {"max_position_embeddings": WITHOUT, "partial_rotary_factor": 0.5, "layer_types": [FULL, FULL]}),
    ("llama", {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("llama", {"rope_theta": 500, "rope_scaling": {"type": "dynamic", "factor": 3.0}}),
    ("llama", {"rope_theta": 500, "rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}),
    ("llama", {"rope_scaling": {"type": "default", "rope_theta": 70.0}, "rope_parameters": {"rope_theta": 9.0}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}, "rope_theta": 9.0}),
    ("llama", {"hidden_act": "gelu_fast", "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.01}),
    ("llama", {"hidden_act": "gelu_python", "tie_word_embeddings": True, "architectures": ["LlamaModel"]}),
    ("llama", {"sliding_window": 2, "attn_logit_softcapping": 0.1, "logit_scale": 9.0, "mask": [1]}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 8, "attention_bias": True}),
    ("mistral", {"sliding_window": 3, "rope_theta": 1e6, "head_dim": 6, "num_key_value_heads": 2}),
    ("qwen2", {**MANY, "qkv_bias": True, "attention_bias": False}),
    ("qwen2", {**MANY, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"num_key_value_heads": 2, "sliding_window": 3, "use_sliding_window": False}),
    ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 6}),
    ("qwen2", {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 3, "layer_types": [SLIDING, FULL]
    }),
    ("qwen3", MANY),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "rope_theta": 1e6}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 6, "use_sliding_window": True, "max_window_layers": 1}),
    ("olmo2", {"rope_theta": 500_000, "rope_scaling": None}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 2, "rms_norm_eps": 0.01}),
    ("gemma2", {"num_key_value_heads": WITHOUT, "head_dim": WITHOUT, "num_hidden_layers": 2}),
    ("gemma2", {**GEMMA, "hidden_act": "gelu", "sliding_window": 3, "cache_implementation": "hybrid"}),
    ("gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {**GEMMA, "attn_logit_softcapping": 0.5, "hidden_activation": "silu", "attention_bias": True}),
    ("gemma2", {**GEMMA, "final_logit_softcapping": 0.5, "layer_types": [FULL] * 7, "tie_word_embeddings": False}),
    ("gemma3_text", GEMMA),
    ("gemma3_text", {**GEMMA, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 0.5}),
    ("gemma3_text", {
        **GEMMA, "rope_theta": 1000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 3,
    }),
    ("gemma3_text", {
        **GEMMA, "sliding_window": 3, "rope_parameters": {FULL: {"rope_theta": 50.0, "rope_type": "default"}}
    }),
    ("gemma3_text", {
        **GEMMA, "layer_types": [FULL] + [SLIDING] * 6, "_sliding_window_pattern": 3, "sliding_window": 3,
        "rope_parameters": {SLIDING: {"rope_theta": 50.0}, FULL: {"rope_theta": 70.0}},
    }),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 20, "reorder_and_upcast_attn": True, "activation_function": "gelu", "n_ctx": 32}),
    ("gpt2", {"n_embd": WITHOUT, "hidden_size": 32, "n_positions": WITHOUT, "tie_word_embeddings": False}),
    ("gpt_neox", NEOX),
    ("gpt_neox", {
        **NEOX, "rotary_pct": 0.5, "rotary_emb_base": 100, "hidden_act": "gelu_fast", "attention_bias": False
    }),
    ("gpt_neox", {
        **NEOX, "rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 100, "rope_theta": 100,
        "rope_scaling": None, "classifier_dropout": 0.1, "use_parallel_residual": False,
    }),
    ("gpt_neox", {
        **NEOX, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "rotary_pct": 0.25, "rotary_emb_base": 10_000, "is_decoder": True,
    }),
    ("gpt_neox", {**NEOX, "rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_emb_base": 100}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_file_has_one_function(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    peer = written(kind, changes, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    require_equal(checkpoint.family.config, peer.config)
    theirs = logits_of(peer, TOKENS)
    ours = np.asarray(run(checkpoint.model, Text(jnp.asarray(TOKENS, jnp.int32), jnp.zeros(2, jnp.int32))))
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def written(kind: str, changes: dict[str, Any], folder: Path) -> Any:
    """A file of a model type, and the random model that `transformers` makes of it, with its weights beside it."""
    transformers = pytest.importorskip("transformers")
    given = {"model_type": kind, **(GPT2 if kind == "gpt2" else SIZES), **changes}
    text = json.dumps({name: value for name, value in given.items() if value != WITHOUT})
    (folder / "config.json").write_text(text)
    peer = peer_of(transformers.AutoConfig.from_pretrained(folder), attn_implementation="eager")
    peer.save_pretrained(folder)
    (folder / "config.json").write_text(text)
    if "LlamaModel" in changes.get("architectures", ()):
        tensors = load_file(folder / "model.safetensors")
        save_file({name.removeprefix("model."): t for name, t in tensors.items()}, folder / "model.safetensors")
    return peer


def require_equal(ours: TransformerConfig, theirs: Any) -> None:
    """What twelve tokens do not show: long windows, high caps, the context."""
    assert ours.context == theirs.max_position_embeddings
    assert ours.tied == theirs.tie_word_embeddings
    read = theirs.model_type in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
    window = theirs.sliding_window if read else None
    kinds = getattr(theirs, "layer_types", None) if theirs.model_type != "mistral" else None
    windowed = [kind == SLIDING for kind in kinds] if kinds else [window is not None] * ours.layers
    if window is None or not any(windowed):
        assert (ours.window, ours.windowed) == (None, ())
    else:
        assert (ours.window, list(ours.windowed)) == (window, windowed)
    if theirs.model_type.startswith("gemma"):
        assert ours.logit_cap == theirs.final_logit_softcapping
    if theirs.model_type == "gemma2":
        assert ours.attention_cap == theirs.attn_logit_softcapping
