"""Gemma 2: norms before and after the sublayers, capped logits, a window in every other layer."""

from typing import Any

from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "Gemma2ForCausalLM", "gemma2"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    window = settings.take_or_none("sliding_window", 4096)
    return read_gemma(
        settings,
        context=8192,
        attention_cap=settings.take_or_none("attn_logit_softcapping", 50.0),
        logit_cap=settings.take_or_none("final_logit_softcapping", 30.0),
        **settings.windows(lambda layer: layer % 2 == 0, window),
    )


def read_gemma(settings: Settings, *, context: int, **fixed: Any) -> TransformerConfig:
    """The configuration, from the settings that Gemma 2 and 3 have in common and the fields in `fixed`."""
    settings.require("use_bidirectional_attention", False)
    settings.take("hidden_act")  # an older name, which hidden_activation overrides
    settings.given["hidden_act"] = settings.take("hidden_activation", "gelu_pytorch_tanh")
    bias = bool(settings.take("attention_bias", False))
    sizes = settings.sizes(context=context, kv_heads=4, head_width=256)
    return llama.read_like(
        settings,
        sizes,
        tied=True,
        attention_bias=bias,
        output_bias=bias,
        norm_offset=True,
        post_norm=True,
        embedding_scale=sizes["width"] ** 0.5,
        attention_scale=settings.take("query_pre_attn_scalar", 256) ** -0.5,
        **fixed,
    )
