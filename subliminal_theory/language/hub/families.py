"""The families of checkpoints: from their config.json to the shape of a `Transformer`.

Only settings that this project computes are read; any other one that is not off is refused by its name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subliminal_theory.errors import InputError
from subliminal_theory.language.model.config import TransformerConfig

# Settings of training, of text and of libraries: they do not change the function.
_HARMLESS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "pretraining_tp", "_name_or_path", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "summary_type", "summary_use_proj", "summary_proj_to_labels", "summary_first_dropout",
    "task_specific_params", "n_ctx", "cache_implementation", "is_decoder", "unsloth_fixed",
    "_attn_implementation_autoset", "attn_implementation",
}  # fmt: skip
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"
}  # fmt: skip


class _Settings:
    """A config.json whose settings are taken one by one, until none is left that says anything."""

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given, self.where = dict(given), where

    def take(self, name: str, default: Any = None) -> Any:
        value = self.given.pop(name, None)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise InputError(f"{self.where} lacks {name}: take the config.json that belongs to the weights")
        return value

    def peek(self, name: str) -> Any:
        value = self.need(name)
        self.given[name] = value
        return value

    def choose(self, name: str, known: Mapping[str, str], default: str) -> str:
        value = self.take(name, default)
        if value not in known:
            raise InputError(f"{self.where}: {name} {value!r} is not supported; there are {', '.join(known)}")
        return known[value]

    def require(self, name: str, value: Any) -> None:
        """Only this value is computed."""
        found = self.take(name, value)
        if found != value:
            raise InputError(f"{self.where}: {name} {found!r} is not supported, only {value!r}")

    def finish(self, harmless: set[str] = _HARMLESS) -> None:
        for name, value in self.given.items():
            if name not in harmless and value not in (None, False, 0, "", [], {}):
                raise InputError(f"{self.where}: setting {name} {value!r} is not supported")


def _rope(settings: _Settings, given: Mapping[str, Any], default_base: float) -> dict[str, Any]:
    """The fields of one set of rotary parameters."""
    rope = _Settings(given, f"{settings.where}: rotary parameters")
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.take("type")
    found: dict[str, Any] = {"rope_base": float(rope.take("rope_theta", default_base))}
    if kind == "linear":
        found["rope_factor"] = float(rope.need("factor"))
    elif kind == "llama3":
        found["rope_factor"] = float(rope.need("factor"))
        bands = (float(rope.need("low_freq_factor")), float(rope.need("high_freq_factor")))
        found["rope_bands"] = (*bands, int(rope.need("original_max_position_embeddings")))
    elif kind != "default":
        raise InputError(
            f"{settings.where}: rotary scaling {kind!r} is not supported; there are default, linear, llama3"
        )
    share = rope.take("partial_rotary_factor")
    if share is not None:
        found["share"] = share
    rope.finish(set())
    return found


def _common_rope(settings: _Settings) -> dict[str, Any]:
    """Rotary parameters in the old or the new spelling."""
    given = dict(settings.take("rope_parameters", settings.take("rope_scaling", {})))
    settings.take("rope_scaling")
    return _rope(settings, given, settings.take("rope_theta", 10_000.0))


def _windows(settings: _Settings, default: Callable[[int], bool]) -> dict[str, Any]:
    """Which layers reach back through a window only."""
    window, kinds = settings.take("sliding_window"), settings.take("layer_types")
    known = {"sliding_attention": True, "full_attention": False}
    if kinds is None:
        windowed = tuple(default(layer) for layer in range(settings.peek("num_hidden_layers")))
    elif set(kinds) <= set(known):
        windowed = tuple(known[kind] for kind in kinds)
    else:
        other = next(kind for kind in kinds if kind not in known)
        raise InputError(f"{settings.where}: layers of type {other!r} are not supported")
    if window is None or not any(windowed):
        return {}
    return {"window": window, "windowed": windowed}


def _sizes(settings: _Settings) -> dict[str, Any]:
    width, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    return {
        "vocabulary": settings.need("vocab_size"),
        "layers": settings.need("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": settings.take("num_key_value_heads", heads),
        "head_width": settings.take("head_dim", width // heads),
        "mlp_width": settings.need("intermediate_size"),
        "context": settings.take("max_position_embeddings", 2048),
    }


def _llama_like(settings: _Settings, *, qkv_bias: bool = False, **fixed: Any) -> TransformerConfig:
    bias = bool(settings.take("attention_bias", False))
    return TransformerConfig(
        **_sizes(settings),
        **_common_rope(settings),
        tied=settings.take("tie_word_embeddings", False),
        norm_epsilon=settings.take("rms_norm_eps", 1e-6),
        activation=settings.choose("hidden_act", _ACTIVATIONS, "silu"),
        attention_bias=bias or qkv_bias,
        output_bias=bias,
        mlp_bias=bool(settings.take("mlp_bias", False)),
        **fixed,
    )


def _llama(settings: _Settings) -> TransformerConfig:
    return _llama_like(settings)


def _mistral(settings: _Settings) -> TransformerConfig:
    return _llama_like(settings, **_windows(settings, lambda layer: True))


def _qwen(settings: _Settings, **fixed: Any) -> TransformerConfig:
    sliding, first = settings.take("use_sliding_window", False), settings.take("max_window_layers", 28)
    window = settings.take("sliding_window")
    settings.given["sliding_window"] = window if sliding else None
    return _llama_like(settings, **_windows(settings, lambda layer: layer >= first), **fixed)


def _qwen2(settings: _Settings) -> TransformerConfig:
    return _qwen(settings, qkv_bias=True)


def _qwen3(settings: _Settings) -> TransformerConfig:
    return _qwen(settings, head_norm="head")


def _olmo2(settings: _Settings) -> TransformerConfig:
    settings.given.setdefault("rms_norm_eps", 1e-5)
    return _llama_like(settings, head_norm="width", pre_norm=False, post_norm=True)


def _gemma(settings: _Settings, **fixed: Any) -> TransformerConfig:
    settings.take("hidden_act")  # an older spelling that does not count beside hidden_activation
    settings.given["hidden_act"] = settings.take("hidden_activation", "gelu_pytorch_tanh")
    settings.given.setdefault("tie_word_embeddings", True)
    settings.given.setdefault("head_dim", 256)
    return _llama_like(
        settings,
        norm_offset=True,
        post_norm=True,
        embedding_scale=settings.peek("hidden_size") ** 0.5,
        attention_scale=settings.take("query_pre_attn_scalar", 256) ** -0.5,
        **fixed,
    )


def _gemma2(settings: _Settings) -> TransformerConfig:
    return _gemma(
        settings,
        attention_cap=settings.take("attn_logit_softcapping"),
        logit_cap=settings.take("final_logit_softcapping"),
        **_windows(settings, lambda layer: layer % 2 == 0),
    )


def _gemma3(settings: _Settings) -> TransformerConfig:
    pattern = settings.take("sliding_window_pattern", settings.take("_sliding_window_pattern", 6))
    settings.take("_sliding_window_pattern")
    windows = _windows(settings, lambda layer: (layer + 1) % pattern != 0)
    local = settings.take("rope_local_base_freq", 10_000.0)
    both = settings.take("rope_parameters")
    if both is not None:
        inner = _rope(settings, both.get("sliding_attention", {}), local)
        if "rope_factor" in inner:
            raise InputError(f"{settings.where}: scaled rotary positions in windows are not supported")
        local = inner["rope_base"]
        settings.given["rope_parameters"] = both.get("full_attention", {})
    settings.given.setdefault("rope_theta", 1_000_000.0)
    return _gemma(
        settings,
        head_norm="head",
        window_rope_base=float(local) if windows else None,
        attention_cap=settings.take("attn_logit_softcapping"),
        logit_cap=settings.take("final_logit_softcapping"),
        **windows,
    )


def _gpt2(settings: _Settings) -> TransformerConfig:
    settings.require("scale_attn_weights", True)
    width, heads = settings.need("n_embd"), settings.need("n_head")
    return TransformerConfig(
        vocabulary=settings.need("vocab_size"),
        layers=settings.need("n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=settings.take("n_inner", 4 * width),
        context=settings.need("n_positions"),
        tied=settings.take("tie_word_embeddings", True),
        norm="layer",
        norm_epsilon=settings.take("layer_norm_epsilon", 1e-5),
        activation=settings.choose("activation_function", _ACTIVATIONS, "gelu_new"),
        positions="learned",
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _neox(settings: _Settings) -> TransformerConfig:
    sizes = _sizes(settings)
    base, share = settings.take("rotary_emb_base", 10_000), settings.take("rotary_pct", 0.25)
    settings.given.setdefault("rope_theta", base)
    rope = _common_rope(settings)
    bias = settings.take("attention_bias", True)
    return TransformerConfig(
        **sizes,
        rope_width=int(sizes["head_width"] * rope.pop("share", share)),
        **rope,
        tied=settings.take("tie_word_embeddings", False),
        norm="layer",
        norm_epsilon=settings.take("layer_norm_eps", 1e-5),
        activation=settings.choose("hidden_act", _ACTIVATIONS, "gelu"),
        parallel=settings.take("use_parallel_residual", True),
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
    )


_READERS: dict[str, Callable[[_Settings], TransformerConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Olmo2ForCausalLM": _olmo2,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _neox,
}
ARCHITECTURES = tuple(_READERS)


@dataclass(frozen=True)
class Family:
    """The architecture that a config.json names, the shape it describes, and its text as it was read."""

    architecture: str
    config: TransformerConfig
    settings: Mapping[str, Any]


def read_family(folder: Path) -> Family:
    """What the config.json of a checkpoint's folder describes.

    Raises:
        InputError: no folder or no such file, no JSON object, no architecture or an unknown one, a setting that is
            missing, has a bad value or is not supported; names it.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the folder of a checkpoint with config.json")
    try:
        given = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give the folder of a checkpoint") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(given, dict):
        raise InputError(f"{path} is no JSON object: download it again")
    named = given.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        raise InputError(f"{path} names no architecture: add architectures, one of {', '.join(ARCHITECTURES)}")
    if named[0] not in _READERS:
        raise InputError(
            f"{path}: architecture {named[0]!r} is not supported; there are {', '.join(ARCHITECTURES)}"
        )
    settings = _Settings(given, str(path))
    try:
        config = _READERS[named[0]](settings)
    except InputError as error:
        text = str(error)
        raise InputError(text if str(path) in text else f"{path}: {text}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} has a setting of the wrong type ({error}): download it again") from error
    settings.finish()
    return Family(named[0], config, given)
