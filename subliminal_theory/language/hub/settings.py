"""A config.json of Hugging Face, read setting by setting into the fields of a `TransformerConfig`.

Only settings that this project computes are read; any other one that is not off is refused by its name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from subliminal_theory.errors import InputError

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


class Settings:
    """The settings of a file, taken out one by one; `finish` refuses what is left and says anything.

    Attributes:
        given: the settings that are left.
        where: the file, for messages.

    Raises:
        InputError: from every method, where a setting is missing or is not supported; names it.
    """

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given, self.where = dict(given), where

    def take(self, name: str, default: Any = None) -> Any:
        """A setting, or the default where it is missing or null."""
        value = self.given.pop(name, None)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """A setting that must be there."""
        value = self.take(name)
        if value is None:
            raise InputError(f"{self.where} lacks {name}: take the config.json that belongs to the weights")
        return value

    def peek(self, name: str) -> Any:
        """A setting that must be there, and stays."""
        value = self.need(name)
        self.given[name] = value
        return value

    def require(self, name: str, value: Any) -> None:
        """Refuse a setting that has another value than the only one that is computed."""
        found = self.take(name, value)
        if found != value:
            raise InputError(f"{self.where}: {name} {found!r} is not supported, only {value!r}")

    def finish(self, harmless: set[str] = _HARMLESS) -> None:
        """Refuse what is left, unless it is harmless or off."""
        for name, value in self.given.items():
            if name not in harmless and value not in (None, False, 0, "", [], {}):
                raise InputError(f"{self.where}: setting {name} {value!r} is not supported")

    def activation(self, name: str, default: str) -> str:
        """The activation of the MLP."""
        value = self.take(name, default)
        if value not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise InputError(f"{self.where}: {name} {value!r} is not supported; there are {known}")
        return _ACTIVATIONS[value]

    def sizes(self) -> dict[str, Any]:
        """The sizes of a transformer, under the names that most families use."""
        width, heads = self.need("hidden_size"), self.need("num_attention_heads")
        return {
            "vocabulary": self.need("vocab_size"),
            "layers": self.need("num_hidden_layers"),
            "width": width,
            "heads": heads,
            "kv_heads": self.take("num_key_value_heads", heads),
            "head_width": self.take("head_dim", width // heads),
            "mlp_width": self.need("intermediate_size"),
            "context": self.take("max_position_embeddings", 2048),
        }

    def rotary(self) -> dict[str, Any]:
        """The rotary embedding, in the old or the new spelling."""
        given = dict(self.take("rope_parameters", self.take("rope_scaling", {})))
        self.take("rope_scaling")
        return self.rotary_of(given, self.take("rope_theta", 10_000.0))

    def rotary_of(self, given: Mapping[str, Any], default_base: float) -> dict[str, Any]:
        """One set of rotary parameters; `share` is the part of a head that is rotated, where that is not all."""
        rope = Settings(given, f"{self.where}: rotary parameters")
        kind = rope.take("rope_type", rope.take("type", "default"))
        rope.take("type")
        found: dict[str, Any] = {"rope_base": float(rope.take("rope_theta", default_base))}
        if kind in ("linear", "llama3"):
            found["rope_factor"] = float(rope.need("factor"))
        elif kind != "default":
            known = "default, linear, llama3"
            raise InputError(f"{self.where}: rotary scaling {kind!r} is not supported; there are {known}")
        if kind == "llama3":
            bands = (float(rope.need("low_freq_factor")), float(rope.need("high_freq_factor")))
            found["rope_bands"] = (*bands, int(rope.need("original_max_position_embeddings")))
        share = rope.take("partial_rotary_factor")
        if share is not None:
            found["share"] = share
        rope.finish(set())
        return found

    def windows(self, default: Callable[[int], bool]) -> dict[str, Any]:
        """The layers that attend to a window alone, by `default` where the file does not list them."""
        window, kinds = self.take("sliding_window"), self.take("layer_types")
        known = {"sliding_attention": True, "full_attention": False}
        if kinds is None:
            windowed = tuple(default(layer) for layer in range(self.peek("num_hidden_layers")))
        elif set(kinds) <= set(known):
            windowed = tuple(known[kind] for kind in kinds)
        else:
            other = next(kind for kind in kinds if kind not in known)
            raise InputError(f"{self.where}: layers of type {other!r} are not supported")
        if window is None or not any(windowed):
            return {}
        return {"window": window, "windowed": windowed}
