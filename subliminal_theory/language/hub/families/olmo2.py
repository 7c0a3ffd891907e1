"""OLMo 2: Llama with norms after the sublayers, not before, and norms of query and key."""

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE = "Olmo2ForCausalLM"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The shape."""
    settings.given.setdefault("rms_norm_eps", 1e-5)
    return llama.read(settings, head_norm="width", pre_norm=False, post_norm=True)
