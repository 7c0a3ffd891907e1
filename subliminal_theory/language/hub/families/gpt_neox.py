"""GPT-NeoX (Pythia): parallel sublayers. Query, key and value are in one matrix, head by head."""

from typing import Any

from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.hub.tensor_map import Entry, fused, layer_norm, linear
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "GPTNeoXForCausalLM", "gpt_neox"


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    settings.take("num_key_value_heads")  # has no effect in this family
    sizes = settings.sizes(context=2048)
    share, rotary = _rotary(settings, sizes["context"])
    bias = bool(settings.take("attention_bias", True))
    return TransformerConfig(
        **sizes,
        rope_width=int(sizes["head_width"] * share),
        **rotary,
        tied=settings.take("tie_word_embeddings", False),
        norm="layer",
        norm_epsilon=settings.take("layer_norm_eps", 1e-5),
        activation=settings.activation("hidden_act", "gelu"),
        parallel=settings.take("use_parallel_residual", True),
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
    )


def _rotary(settings: Settings, context: int) -> tuple[float, dict[str, Any]]:
    """The share of a head that rotates, and the rotary embedding as fields of `TransformerConfig`.

    Each of these settings has had three names; all names that a file has must agree.
    """
    new, old = settings.take("rope_parameters", {}), settings.take("rope_scaling", {})
    given = dict(old or new)
    base, share = settings.take("rotary_emb_base", 10_000.0), settings.take("rotary_pct", 0.25)
    given["rope_theta"] = given.get("rope_theta") or base
    share = given.get("partial_rotary_factor") or share
    settings.require_agreement("rope_theta", given["rope_theta"], "the base")
    settings.require_agreement("partial_rotary_factor", share, "the share of a head")
    return share, settings.rotary_of(given, base, context)


def tensors(config: TransformerConfig) -> list[Entry]:
    """The tensors."""
    found = [Entry("gpt_neox.embed_in.weight", ("embedding",))]
    widths = 3 * [config.heads * config.head_width]
    for layer in range(config.layers):
        at, to = f"gpt_neox.layers.{layer}", f"layers/{layer}"
        found += layer_norm(f"{at}.input_layernorm", f"{to}/attention_norm")
        found += layer_norm(f"{at}.post_attention_layernorm", f"{to}/mlp_norm")
        ours = [f"{to}/attention/{name}" for name in ("query", "key", "value")]
        found += fused(
            f"{at}.attention.query_key_value",
            ours,
            widths,
            config.attention_bias,
            transposed=True,
            groups=config.heads,
        )
        found += linear(f"{at}.attention.dense", f"{to}/attention/output", config.output_bias)
        found += linear(f"{at}.mlp.dense_h_to_4h", f"{to}/mlp/up", True)
        found += linear(f"{at}.mlp.dense_4h_to_h", f"{to}/mlp/down", True)
    found += layer_norm("gpt_neox.final_layer_norm", "norm")
    return found + linear("embed_out", "head", False) * (not config.tied)
