"""OLMo 2: Llama with norms after the sublayers instead of before, and norms of query and key."""

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "Olmo2ForCausalLM", "olmo2"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    bias = bool(settings.take("attention_bias", False))
    return llama.read_like(
        settings, settings.sizes(context=2048), epsilon=1e-5, attention_bias=bias, output_bias=bias,
        head_norm="width", pre_norm=False, post_norm=True,
    )  # fmt: skip
