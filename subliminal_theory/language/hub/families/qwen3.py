"""Qwen 3: Llama with norms of query and key in each head, and windows in the upper layers."""

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.families.qwen2 import upper_windows
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE = "Qwen3ForCausalLM"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The shape."""
    return llama.read(settings, head_norm="head", **upper_windows(settings))
