"""The model in a GGUF file in the form of Hugging Face: the settings of a config.json, and tensors with its names.

Converters to GGUF change some tensors. In the queries and keys of Llama, they put the two rows that rotate
together next to each other. They also add the 1 of Gemma's norms to the scales. This module undoes both.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from subliminal_theory.errors import InputError, one_line, shown
from subliminal_theory.language.hub.gguf_file import GgufFile, Stored, types_checked
from subliminal_theory.language.hub.settings import Settings

_NAMES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_GEMMA = ("gemma2", "gemma3")
_HARMLESS = {
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"
}  # fmt: skip
_EMBEDDING, _HEAD, _FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
_TOP = {
    _EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    _HEAD: "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
# Layers of the models with 27 billion parameters. Their scores are scaled by width / heads, not by the head width.
_LARGEST = {"gemma2": 46, "gemma3": 62}
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192  # settings of Llama 3; a file only has the divisors that result from them


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that is read when NumPy asks for it.

    Attributes:
        stored: the tensor in the file.
        heads: if not 0, the number of heads whose pairs of rows are next to each other.
        offset: whether the stored tensor has 1 added.
    """

    stored: Stored
    heads: int = 0
    offset: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, outputs first."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the array that NumPy gets."""
        return np.dtype(np.float32) if self.offset else self.stored.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.stored.floats()
        if self.offset:
            found = found.astype(np.float32) - np.float32(1)
        if self.heads:
            pairs = found.reshape(self.heads, -1, 2, *self.shape[1:])
            found = pairs.swapaxes(1, 2).reshape(self.shape)
        return found if dtype is None else found.astype(dtype)


def tensors_of(file: GgufFile) -> dict[str, Tensor]:
    """The tensors by their names at Hugging Face. Tensors without such a name keep their own."""
    settings, architecture = settings_of(file), file.metadata["general.architecture"]
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    parts = _PARTS | (_GEMMA_NORMS if architecture in _GEMMA else _NORMS)
    found = {}
    for name, stored in file.tensors.items():
        block = _BLOCK.fullmatch(name)
        layer, part, leaf = block.groups() if block else ("", "", "")
        theirs = f"model.layers.{layer}.{parts[part]}.{leaf}" if part in parts else _TOP.get(name, name)
        found[theirs] = Tensor(
            stored,
            heads.get(part, 0) if architecture == "llama" else 0,
            offset=architecture in _GEMMA and name.endswith("norm.weight"),
        )
    found.pop(_FREQUENCIES, None)
    return found


def settings_of(file: GgufFile) -> dict[str, Any]:
    """The settings that a config.json would have.

    Raises:
        InputError: the file has no model or one of an unknown architecture, lacks a setting, or has a setting that
            is not supported; the message names it.
    """
    with types_checked(file.path):
        return _settings_of(file)


def _settings_of(file: GgufFile) -> dict[str, Any]:
    kind, architecture = file.metadata.get("general.type", "model"), file.metadata.get("general.architecture")
    if kind != "model":
        raise InputError(f"{file.path} holds no model ({one_line(kind)}): give one of general.type 'model'")
    if architecture not in _NAMES:
        raise InputError(
            f"{file.path}: architecture {shown(architecture)} is not supported; there are {', '.join(_NAMES)}"
        )
    if _EMBEDDING not in file.tensors:
        raise InputError(f"{file.path} has no tensor {_EMBEDDING}: download it again")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in own.items()}
    given = Settings(plain, f"{file.path}, {architecture}")
    name, model_type = _NAMES[architecture]
    found = {
        "architectures": [name],
        "model_type": model_type,
        **_sizes(given, len(file.tensors)),
        **_tokens(file.metadata),
    }
    found["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    found["tie_word_embeddings"] = _HEAD not in file.tensors
    if architecture == "llama":
        found["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        found["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    found |= _rotary(given, file.tensors.get(_FREQUENCIES), found["head_dim"])
    if architecture in _GEMMA:
        found |= _gemma(given, architecture, found)
    given.refuse_rest(_HARMLESS)
    return found


def _number(given: Settings, name: str, default: int | None = None, kind: type[int] | type[float] = int) -> Any:
    """A positive number, which must be the same in all layers."""
    value = given.take(name, default)
    if value is None:
        raise InputError(f"{given.where} lacks {name}: download the file again")
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, kind) or value <= 0:
        only = f"only one positive {'whole ' if kind is int else ''}number for all layers"
        raise InputError(f"{given.where}: {name} {shown(value)} is not supported, {only}")
    return value


def _sizes(given: Settings, tensors: int) -> dict[str, Any]:
    width, heads = _number(given, "embedding_length"), _number(given, "attention.head_count")
    head = _number(given, "attention.key_length", width // heads)
    for same in ("attention.value_length", "rope.dimension_count"):
        given.require(same, head)
    given.require("attention.causal", True)
    layers = _number(given, "block_count")
    if layers > tensors:
        raise InputError(f"{given.where}: block_count {layers} of {tensors} tensors: download it again")
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": _number(given, "attention.head_count_kv", heads),
        "head_dim": head,
        "num_hidden_layers": layers,
        "intermediate_size": _number(given, "feed_forward_length"),
        "max_position_embeddings": _number(given, "context_length"),
        "rms_norm_eps": _number(given, "attention.layer_norm_rms_epsilon", kind=float),
    }


def _tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    theirs = {"bos": "bos", "eos": "eos", "padding": "pad"}
    keys = {f"tokenizer.ggml.{name}_token_id": f"{to}_token_id" for name, to in theirs.items()}
    return {to: metadata[key] for key, to in keys.items() if key in metadata}


def _rotary(given: Settings, divisors: Stored | None, head: int) -> dict[str, Any]:
    base = float(given.take("rope.freq_base", 10_000.0))
    kind, older = given.take("rope.scaling.type", "linear"), given.take("rope.scale_linear", 0.0)
    factor = given.take("rope.scaling.factor", older)
    given.require("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear"):
        raise InputError(
            f"{given.where}: rope.scaling.type {shown(kind)} is not supported; there are none, linear"
        )
    scaled = kind == "linear" and factor not in (0.0, 1.0)
    found: dict[str, Any] = {"rope_theta": base}
    if scaled:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if divisors is not None and (divisors.floats() != 1).any():
        if scaled:
            raise InputError(f"{given.where}: {_FREQUENCIES} beside rope.scaling.factor is not supported")
        found["rope_scaling"] = _bands(given, divisors.floats(), base, head)
    return found


def _bands(given: Settings, divisors: np.ndarray, base: float, head: int) -> dict[str, Any]:
    """The rotary scaling of Llama 3 that gives these divisors of angles."""
    factor = float(divisors.max())
    turns = _ORIGINAL / (2 * np.pi) * base ** (-2 * np.arange(head // 2) / head)
    kept = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise InputError(f"{given.where}: {_FREQUENCIES} does not match Llama 3, the only supported scaling")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }  # fmt: skip


def _gemma(given: Settings, architecture: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    layers, width, heads = (sizes[n] for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    scale = width // heads if layers == _LARGEST[architecture] else sizes["head_dim"]
    found = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scale}
    if architecture == "gemma2":
        found["attn_logit_softcapping"] = given.take("attn_logit_softcapping", 50.0)
        found["final_logit_softcapping"] = given.take("final_logit_softcapping", 30.0)
        window, period = given.take("attention.sliding_window", 4096), 2
    else:
        found["rope_local_base_freq"] = float(given.take("rope.freq_base_swa", 10_000.0))
        found["final_logit_softcapping"] = given.take("final_logit_softcapping")
        window = given.take("attention.sliding_window", 0)
        period = given.take("attention.sliding_window_pattern", 6)
    windowed = period if isinstance(period, list) else [(layer + 1) % period != 0 for layer in range(layers)]
    kinds = ["sliding_attention" if window and own else "full_attention" for own in windowed]
    return {**found, "sliding_window": window or None, "layer_types": kinds}
