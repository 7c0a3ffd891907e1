"""Qwen 2 and 2.5: Llama with biases of query, key and value, and windowed upper layers."""

from typing import Any

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "Qwen2ForCausalLM", "qwen2"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    windows = upper_windows(settings)
    sizes = settings.sizes(context=32_768, kv_heads=32)
    return llama.read_like(settings, sizes, attention_bias=True, **windows)


def upper_windows(settings: Settings) -> dict[str, Any]:
    """Fields of `TransformerConfig`: windows from layer `max_window_layers` on if `use_sliding_window` is set."""
    first, window = settings.take("max_window_layers", 28), settings.take_or_none("sliding_window", 4096)
    if not settings.take("use_sliding_window", False):
        window = None
    return settings.windows(lambda layer: window is not None and layer >= first, window)
