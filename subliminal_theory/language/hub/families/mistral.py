"""Mistral: Llama with windowed attention."""

from subliminal_theory.errors import InputError, shown
from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "MistralForCausalLM", "mistral"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer. If there is a window, all layers have it.

    Raises:
        InputError: layer_types contradicts this; `transformers` does not read it for this family.
    """
    window, kinds = settings.take_or_none("sliding_window", 4096), settings.take("layer_types", [])
    kind = "full_attention" if window is None else "sliding_attention"
    if set(kinds) - {kind}:
        raise InputError(
            f"{settings.where}: layer_types {shown(kinds)} is not supported, only {kind!r} in all layers"
        )
    windows = settings.windows(lambda layer: window is not None, window)
    return llama.read_like(settings, settings.sizes(context=131_072, kv_heads=8), **windows)
