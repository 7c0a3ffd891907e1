"""Reads a config.json of Hugging Face, setting by setting, into the fields of a `TransformerConfig`.

A setting that changes the function is read by its family, or refused by name. All other settings are ignored,
because the modeling code of `transformers` does not read them either. Ignored names that are not known to be
harmless are logged, in one line per file.
"""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from subliminal_theory.errors import InputError, one_line, shown

_log = logging.getLogger(__name__)
_MOST_LAYERS = 10_000

# Settings that change the function of any causal model unless they are off, and why they are refused.
_REFUSED = {
    "quantization_config": "the weights are quantized; save them as floating-point numbers first",
    "compression_config": "the weights are compressed; save them as floating-point numbers first",
    "per_layer_config": "layers of different shapes are not computed",
    "pruned_heads": "layers without some of their heads are not computed",
}
# Settings that do not change the function of a causal model, grouped by what reads them. They are ignored
# silently.
_HARMLESS = {
    # which class reads the file, and which program wrote it
    "architectures", "model_type", "auto_map", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "unsloth_fixed", "unsloth_version", "transformers.js_config", "tokenizer_class",
    "is_llama_config", "custom_pipelines", "peft_version", "license",
    # dtypes, kernels and memory
    "torch_dtype", "dtype", "use_cache", "cache_implementation", "pretraining_tp", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_experts_implementation", "_flash_attn_2_enabled", "_use_flash_attention_2", "use_flash_attn", "torchscript",
    "use_bfloat16", "gradient_checkpointing", "use_reentrant", "chunk_size_feed_forward", "tensor_parallel_size",
    "reorder_and_upcast_attn", "base_model_tp_plan", "return_dict", "output_hidden_states", "output_attentions",
    "tie_last_hidden_states", "use_return_dict", "is_encoder_decoder", "is_decoder", "tie_encoder_decoder",
    "cross_attention_hidden_size", "gguf_file",
    # training: initialization, dropout, noise
    "initializer_range", "attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "neftune_noise_alpha", "embd_layer_norm_std", "layer_norm_init", "initializer_cutoff_factor",
    # how positions were laid out before the weights were converted, and lengths that no code reads
    "rope_interleaved", "n_ctx", "sliding_window_size", "model_max_length", "max_sequence_length", "seq_length",
    # tokens and text
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "prefix", "vocab_file",
    # heads of other tasks
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task", "summary_type",
    "summary_use_proj", "summary_proj_to_labels", "summary_first_dropout", "summary_activation",
    "task_specific_params", "token_classification_bias",
    # sampling, which belongs to generation_config.json
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "penalty_alpha", "num_assistant_tokens", "num_assistant_tokens_schedule",
}  # fmt: skip
# The names of activations in `transformers`. Several names are the same function.
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}  # fmt: skip
_KINDS = {"sliding_attention": True, "full_attention": False, "attention": False}


class Settings:
    """The settings of a file. Methods take them out one by one, and `finish` judges the rest.

    Attributes:
        given: the settings that are left.
        where: the file, for messages.

    Raises:
        InputError: from every method, if a setting is missing or not supported; the message names it.
    """

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given, self.where = dict(given), where

    def take(self, name: str, default: Any = None) -> Any:
        """A setting, or the default if it is missing or null."""
        value = self.given.pop(name, None)
        return default if value is None else value

    def take_or_none(self, name: str, default: Any) -> Any:
        """A setting that may be null, or the default if it is missing."""
        return self.given.pop(name, default)

    def need(self, name: str) -> Any:
        """A setting that must exist and not be null."""
        value = self.take(name)
        if value is None:
            raise InputError(f"{self.where} lacks {name}: take the config.json that belongs to the weights")
        return value

    def layers(self, name: str = "num_hidden_layers") -> Any:
        """The number of layers. Very large numbers are refused, because lists of this length are made."""
        value = self.need(name)
        if value > _MOST_LAYERS:
            raise InputError(f"{self.where}: {name} {shown(value)} is not supported, only up to {_MOST_LAYERS}")
        return value

    def require(self, name: str, value: Any) -> None:
        """Refuse a setting unless it has this value, the only supported one, or is missing."""
        found = self.take(name, value)
        if found != value:
            raise InputError(f"{self.where}: {name} {shown(found)} is not supported, only {value!r}")

    def require_agreement(self, name: str, value: Any, other: str) -> None:
        """Refuse a setting that is a second name for `other` but has another value."""
        found = self.take(name, value)
        if found != value:
            raise InputError(
                f"{self.where}: {name} {shown(found)} is not {other} {shown(value)}: delete the wrong one"
            )

    def finish(self) -> None:
        """Refuse the remaining settings that change the function, and log the unknown ones."""
        self.require("is_causal", True)
        left = {name: value for name, value in self.given.items() if not _off(value)}
        for name, why in _REFUSED.items():
            if name in left:
                raise InputError(f"{self.where}: setting {name} {shown(left[name])} is not supported: {why}")
        if {"full_attention"} == set(left.get("layer_types", ())):
            del left["layer_types"]
        unknown = sorted(left.keys() - _HARMLESS)
        if unknown:
            _tell(self.where, one_line(", ".join(unknown)))

    def refuse_rest(self, harmless: Collection[str]) -> None:
        """Refuse all remaining settings that are not off and not in `harmless`."""
        for name, value in self.given.items():
            if name not in harmless and not _off(value):
                raise InputError(f"{self.where}: setting {one_line(name)} {shown(value)} is not supported")

    def activation(self, name: str, default: str) -> str:
        """The activation of the MLP."""
        value = self.take(name, default)
        if value not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise InputError(f"{self.where}: {name} {shown(value)} is not supported; there are {known}")
        return _ACTIVATIONS[value]

    def sizes(self, *, context: int, kv_heads: int | None = None, head_width: int | None = None) -> dict[str, Any]:
        """The sizes of a transformer, as fields of `TransformerConfig`, from the names that most families use.

        The arguments are the family's defaults. `kv_heads` None means the number of heads. `head_width` None means
        width / heads.
        """
        width, heads = self.need("hidden_size"), self.need("num_attention_heads")
        kv_heads = self.take_or_none("num_key_value_heads", kv_heads)
        return {
            "vocabulary": self.need("vocab_size"),
            "layers": self.layers(),
            "width": width,
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "head_width": self.take("head_dim", head_width or width // heads),
            "mlp_width": self.need("intermediate_size"),
            "context": self.take("max_position_embeddings", context),
        }

    def rotary(self, context: int, base: float = 10_000.0) -> dict[str, Any]:
        """The rotary embedding, as fields of `TransformerConfig`. The old format overrides the new."""
        new, old = self.take("rope_parameters", {}), self.take("rope_scaling", {})
        share = self.take("partial_rotary_factor")
        original = self.take("original_max_position_embeddings")
        given = dict(old or new)
        if original is not None:
            given["original_max_position_embeddings"] = original
        base = self.take("rope_theta", base)
        found = self.rotary_of(given, base, context)
        # Only scaled kinds read this setting, and their frequencies would not fit the heads.
        share = given.get("partial_rotary_factor", share)
        if share not in (None, 1) and given.get("rope_type", given.get("type", "default")) != "default":
            raise InputError(f"{self.where}: partial_rotary_factor {shown(share)} is not supported, only 1")
        return found

    def rotary_of(self, given: Mapping[str, Any], default_base: float, context: int) -> dict[str, Any]:
        """One set of rotary parameters, as fields of `TransformerConfig`. Other keys are ignored."""
        rope = Settings(given, f"{self.where}: rotary parameters")
        kind = rope.take("rope_type", rope.take("type", "default"))
        found: dict[str, Any] = {"rope_base": float(rope.take("rope_theta", default_base))}
        if kind == "dynamic":
            rope.need("factor")  # it applies only to rows longer than the context, which are refused
        elif kind in ("linear", "llama3"):
            found["rope_factor"] = float(rope.need("factor"))
        elif kind != "default":
            known = "default, linear, dynamic, llama3"
            raise InputError(
                f"{self.where}: rotary scaling {shown(kind)} is not supported; there are {known}: "
                "take a checkpoint with one of these"
            )
        if kind == "llama3":
            bands = (float(rope.need("low_freq_factor")), float(rope.need("high_freq_factor")))
            found["rope_bands"] = (*bands, int(rope.take("original_max_position_embeddings", context)))
        return found

    def windows(self, default: Callable[[int], bool], window: int | None) -> dict[str, Any]:
        """The window and the windowed layers, as fields of `TransformerConfig`; empty if no layer has a window.

        `default` says which layers have a window if the file does not list them.
        """
        kinds = self.take("layer_types")
        if kinds is None:
            layers = self.given["num_hidden_layers"] = self.layers()
            windowed = tuple(default(layer) for layer in range(layers))
        elif set(kinds) <= set(_KINDS):
            windowed = tuple(_KINDS[kind] for kind in kinds)
        else:
            other = next(kind for kind in kinds if kind not in _KINDS)
            raise InputError(f"{self.where}: layers of type {shown(other)} are not supported")
        if not any(windowed):
            return {}
        if window is None:
            raise InputError(f"{self.where}: layers have windows, but sliding_window is off: give its length")
        return {"window": window, "windowed": windowed}


def _off(value: Any) -> bool:
    return value is None or value in (False, 0, "", [], {})


@functools.cache
def _tell(where: str, names: str) -> None:
    """Log unknown settings. The cache makes this happen once per file, although files are read several times."""
    _log.warning("%s: ignored, not settings of this architecture: %s", where, names)
