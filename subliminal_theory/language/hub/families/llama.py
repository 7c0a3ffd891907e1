"""Llama, and the parts that most families share with it."""

from typing import Any

from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.hub.tensor_map import Entry, linear
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    bias = bool(settings.take("attention_bias", False))
    mlp_bias = bool(settings.take("mlp_bias", False))
    return read_like(
        settings, settings.sizes(context=2048), attention_bias=bias, output_bias=bias, mlp_bias=mlp_bias
    )


def read_like(
    settings: Settings,
    sizes: dict[str, Any],
    *,
    tied: bool = False,
    epsilon: float = 1e-6,
    base: float = 10_000.0,
    **fixed: Any,
) -> TransformerConfig:
    """The configuration of a family that is like Llama.

    `tied`, `epsilon` and `base` are its defaults for settings that the file lacks. `fixed` are further fields.
    """
    return TransformerConfig(
        **sizes,
        **settings.rotary(sizes["context"], base),
        tied=settings.take("tie_word_embeddings", tied),
        norm_epsilon=settings.take("rms_norm_eps", epsilon),
        activation=settings.activation("hidden_act", "silu"),
        **fixed,
    )


def tensors(config: TransformerConfig) -> list[Entry]:
    """The tensors, also for families with norms after the sublayers or norms of query and key."""
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norm:
        norms = {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm"}
        norms = norms if config.pre_norm else {}
        norms |= {
            "post_attention_layernorm": "attention_post_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    if config.head_norm != "none":
        norms |= {"self_attn.q_norm": "attention/query_norm", "self_attn.k_norm": "attention/key_norm"}
    found = [Entry("model.embed_tokens.weight", ("embedding",))]
    for layer in range(config.layers):
        at, to = f"model.layers.{layer}", f"layers/{layer}"
        found += [Entry(f"{at}.{theirs}.weight", (f"{to}/{ours}/scale",)) for theirs, ours in norms.items()]
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            found += linear(f"{at}.self_attn.{theirs}_proj", f"{to}/attention/{ours}", config.attention_bias)
        found += linear(f"{at}.self_attn.o_proj", f"{to}/attention/output", config.output_bias)
        for name in ("gate", "up", "down"):
            found += linear(f"{at}.mlp.{name}_proj", f"{to}/mlp/{name}", config.mlp_bias)
    found.append(Entry("model.norm.weight", ("norm/scale",)))
    return found + linear("lm_head", "head", False) * (not config.tied)
