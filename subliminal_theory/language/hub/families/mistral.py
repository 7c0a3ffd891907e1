"""Mistral: Llama with windows of attention."""

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE = "MistralForCausalLM"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The shape: all layers have the window, if there is one."""
    return llama.read(settings, **settings.windows(lambda layer: True))
