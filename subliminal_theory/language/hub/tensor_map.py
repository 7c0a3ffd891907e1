"""How the tensors of a family's checkpoints are called, and how they hold the parameters of a `Transformer`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from subliminal_theory.language.hub.families import Family
from subliminal_theory.language.model.config import TransformerConfig


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and the parameters that it holds.

    `layout` is `same`; `transposed`; `columns`, side by side on the last axis; or `heads`: transposed, rows of the
    parts of one head after those of another.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "same"

    def take_apart(self, tensor: np.ndarray, heads: int) -> list[np.ndarray]:
        """The parameters in a tensor, as views of it."""
        if self.layout == "same":
            return [tensor]
        if self.layout == "transposed":
            return [tensor.T]
        if self.layout == "columns":
            return np.split(tensor, len(self.ours), axis=-1)
        parts = tensor.reshape(heads, len(self.ours), -1, *tensor.shape[1:])
        return [parts[:, i].reshape(-1, *tensor.shape[1:]).T for i in range(len(self.ours))]

    def put_together(self, params: Sequence[np.ndarray], heads: int) -> np.ndarray:
        """The inverse of `take_apart`."""
        if self.layout == "same":
            return params[0]
        if self.layout == "transposed":
            return params[0].T
        if self.layout == "columns":
            return np.concatenate(params, axis=-1)
        parts = [part.T.reshape(heads, 1, -1, *part.shape[:-1]) for part in params]
        return np.concatenate(parts, axis=1).reshape(-1, *params[0].shape[:-1])

    def shape(self, params: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor that holds parameters of these shapes."""
        if self.layout == "columns":
            return (*params[0][:-1], sum(shape[-1] for shape in params))
        if self.layout == "heads":
            return (sum(shape[-1] for shape in params), *params[0][:-1])
        return params[0][::-1] if self.layout == "transposed" else params[0]


def entries(family: Family) -> list[Entry]:
    """All tensors of a checkpoint, in its order of layers; those of the head only if it is not tied."""
    make = {"GPT2LMHeadModel": _gpt2_entries, "GPTNeoXForCausalLM": _neox_entries}
    return make.get(family.architecture, _llama_entries)(family.config)


def ignored(name: str) -> bool:
    """Whether a tensor is a table that older libraries stored: positions' frequencies or masks."""
    return (
        re.search(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$", name) is not None
    )


def _linear(theirs: str, ours: str, bias: bool, layout: str = "transposed") -> list[Entry]:
    found = [Entry(f"{theirs}.weight", (f"{ours}/kernel",), layout)]
    return found + [Entry(f"{theirs}.bias", (f"{ours}/bias",))] * bias


def _norm(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.weight", (f"{ours}/scale",)), Entry(f"{theirs}.bias", (f"{ours}/bias",))]


def _llama_entries(config: TransformerConfig) -> list[Entry]:
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norm:
        behind = {
            "post_attention_layernorm": "attention_post_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
        before = {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm"}
        norms = {**(before if config.pre_norm else {}), **behind}
    if config.head_norm != "none":
        norms |= {"self_attn.q_norm": "attention/query_norm", "self_attn.k_norm": "attention/key_norm"}
    found = [Entry("model.embed_tokens.weight", ("embedding",))]
    for number in range(config.layers):
        at, to = f"model.layers.{number}", f"layers/{number}"
        found += [Entry(f"{at}.{theirs}.weight", (f"{to}/{ours}/scale",)) for theirs, ours in norms.items()]
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            found += _linear(f"{at}.self_attn.{theirs}_proj", f"{to}/attention/{ours}", config.attention_bias)
        found += _linear(f"{at}.self_attn.o_proj", f"{to}/attention/output", config.output_bias)
        for name in ("gate", "up", "down"):
            found += _linear(f"{at}.mlp.{name}_proj", f"{to}/mlp/{name}", config.mlp_bias)
    found.append(Entry("model.norm.weight", ("norm/scale",)))
    return found + _linear("lm_head", "head", False) * (not config.tied)


def _gpt2_entries(config: TransformerConfig) -> list[Entry]:
    found = [Entry("transformer.wte.weight", ("embedding",)), Entry("transformer.wpe.weight", ("positions",))]
    for number in range(config.layers):
        at, to = f"transformer.h.{number}", f"layers/{number}"
        found += _norm(f"{at}.ln_1", f"{to}/attention_norm") + _norm(f"{at}.ln_2", f"{to}/mlp_norm")
        for part, leaf in (("weight", "kernel"), ("bias", "bias")):
            ours = tuple(f"{to}/attention/{name}/{leaf}" for name in ("query", "key", "value"))
            found.append(Entry(f"{at}.attn.c_attn.{part}", ours, "columns"))
        found += _linear(f"{at}.attn.c_proj", f"{to}/attention/output", True, "same")
        found += _linear(f"{at}.mlp.c_fc", f"{to}/mlp/up", True, "same")
        found += _linear(f"{at}.mlp.c_proj", f"{to}/mlp/down", True, "same")
    found += _norm("transformer.ln_f", "norm")
    return found + _linear("lm_head", "head", False) * (not config.tied)


def _neox_entries(config: TransformerConfig) -> list[Entry]:
    found = [Entry("gpt_neox.embed_in.weight", ("embedding",))]
    for number in range(config.layers):
        at, to = f"gpt_neox.layers.{number}", f"layers/{number}"
        found += _norm(f"{at}.input_layernorm", f"{to}/attention_norm")
        found += _norm(f"{at}.post_attention_layernorm", f"{to}/mlp_norm")
        for part, leaf in (("weight", "kernel"), ("bias", "bias"))[: 1 + config.attention_bias]:
            ours = tuple(f"{to}/attention/{name}/{leaf}" for name in ("query", "key", "value"))
            found.append(Entry(f"{at}.attention.query_key_value.{part}", ours, "heads"))
        found += _linear(f"{at}.attention.dense", f"{to}/attention/output", config.output_bias)
        found += _linear(f"{at}.mlp.dense_h_to_4h", f"{to}/mlp/up", True)
        found += _linear(f"{at}.mlp.dense_4h_to_h", f"{to}/mlp/down", True)
    found += _norm("gpt_neox.final_layer_norm", "norm")
    return found + _linear("embed_out", "head", False) * (not config.tied)
