"""Gemma 2: norms before and after the sublayers, capped logits, a window in every other layer."""

from typing import Any

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE = "Gemma2ForCausalLM"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The shape."""
    return read_gemma(settings, **settings.windows(lambda layer: layer % 2 == 0))


def read_gemma(settings: Settings, **fixed: Any) -> TransformerConfig:
    """What Gemma 2 and 3 have in common."""
    settings.take("hidden_act")  # an older spelling, which hidden_activation overrides
    settings.given["hidden_act"] = settings.take("hidden_activation", "gelu_pytorch_tanh")
    settings.given.setdefault("tie_word_embeddings", True)
    settings.given.setdefault("head_dim", 256)
    return llama.read(
        settings,
        norm_offset=True,
        post_norm=True,
        embedding_scale=settings.peek("hidden_size") ** 0.5,
        attention_scale=settings.take("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=settings.take("attn_logit_softcapping"),
        logit_cap=settings.take("final_logit_softcapping"),
        **fixed,
    )
