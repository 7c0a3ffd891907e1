"""GPT-2: learned positions and layer norms. Query, key and value are in one matrix, with outputs last."""

from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.hub.tensor_map import Entry, fused, layer_norm, linear
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "GPT2LMHeadModel", "gpt2"
_OTHER_NAMES = {
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}  # fmt: skip


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    settings.require("scale_attn_weights", True)
    settings.require("scale_attn_by_inverse_layer_idx", False)
    settings.require("add_cross_attention", False)
    for name, other in _OTHER_NAMES.items():
        value = settings.take(other)
        if value is not None:
            settings.require_agreement(name, value, other)
            settings.given[name] = value
    width, heads = settings.need("n_embd"), settings.need("n_head")
    return TransformerConfig(
        vocabulary=settings.need("vocab_size"),
        layers=settings.layers("n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=settings.take("n_inner", 4 * width),
        context=settings.take("n_positions", 1024),
        tied=settings.take("tie_word_embeddings", True),
        norm="layer",
        norm_epsilon=settings.take("layer_norm_epsilon", 1e-5),
        activation=settings.activation("activation_function", "gelu_new"),
        positions="learned",
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def tensors(config: TransformerConfig) -> list[Entry]:
    """The tensors."""
    found = [Entry("transformer.wte.weight", ("embedding",)), Entry("transformer.wpe.weight", ("positions",))]
    for layer in range(config.layers):
        at, to = f"transformer.h.{layer}", f"layers/{layer}"
        found += layer_norm(f"{at}.ln_1", f"{to}/attention_norm") + layer_norm(f"{at}.ln_2", f"{to}/mlp_norm")
        ours = [f"{to}/attention/{name}" for name in ("query", "key", "value")]
        found += fused(f"{at}.attn.c_attn", ours, 3 * [config.width], bias=True, transposed=False)
        found += linear(f"{at}.attn.c_proj", f"{to}/attention/output", True, transposed=False)
        found += linear(f"{at}.mlp.c_fc", f"{to}/mlp/up", True, transposed=False)
        found += linear(f"{at}.mlp.c_proj", f"{to}/mlp/down", True, transposed=False)
    found += layer_norm("transformer.ln_f", "norm")
    return found + linear("lm_head", "head", False) * (not config.tied)
