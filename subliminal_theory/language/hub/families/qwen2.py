"""Qwen 2 and 2.5: Llama with biases of query, key and value, and windows in the upper layers."""

from typing import Any

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE = "Qwen2ForCausalLM"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The shape."""
    return llama.read(settings, qkv_bias=True, **upper_windows(settings))


def upper_windows(settings: Settings) -> dict[str, Any]:
    """Windows from layer `max_window_layers` on, if they are switched on."""
    switched_on, first = settings.take("use_sliding_window", False), settings.take("max_window_layers", 28)
    if not switched_on:
        settings.take("sliding_window")
    return settings.windows(lambda layer: layer >= first)
