"""Qwen 3: Llama with norms of query and key in each head, and windowed upper layers."""

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.families.qwen2 import upper_windows
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    bias = bool(settings.take("attention_bias", False))
    windows = upper_windows(settings)
    sizes = settings.sizes(context=32_768, kv_heads=32, head_width=128)
    return llama.read_like(settings, sizes, attention_bias=bias, output_bias=bias, head_norm="head", **windows)
