"""Prompted teachers: a model with a system prompt. The rows that a student reads do not contain the prompt."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Apply, BodyAndHead, Model
from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class _Prompted:
    """A model's parameters, and the tokens before every row."""

    model: PyTree
    prefix: Any


@dataclass(frozen=True)
class _Behind:
    """The function of a model whose prefix replaces the first `replaced` tokens of each row."""

    apply: Apply
    replaced: int

    def __call__(self, params: _Prompted, text: Text) -> Float[Array, "batch last vocabulary"]:
        return self.apply(params.model, self.whole(params, text))

    def whole(self, params: _Prompted, text: Text) -> Text:
        last = text.tokens.shape[1] if text.last is None else text.last
        return replace(with_prefix(text, params.prefix, self.replaced), last=last)

    def features(self, params: _Prompted, text: Text) -> Float[Array, "batch last width"]:
        assert isinstance(self.apply, BodyAndHead)
        return self.apply.features(params.model, self.whole(params, text))

    def readout(self, params: _Prompted, features: Float[Array, "... width"]) -> Float[Array, "... n"]:
        assert isinstance(self.apply, BodyAndHead)
        return self.apply.readout(params.model, features)


def with_prefix(text: Text, prefix: Int[Array, " prefix"], replaced: int = 0) -> Text:
    """Rows in which `prefix` replaces the first `replaced` tokens after the padding."""
    length, extra = text.tokens.shape[1], prefix.shape[0]
    place = jnp.arange(length + extra - replaced)[None] - text.padding[:, None]
    old = jnp.concatenate([jnp.broadcast_to(text.tokens[:, :1], (len(text.tokens), extra)), text.tokens], axis=1)
    new = jnp.where(place < 0, text.tokens[:, :1], prefix[jnp.clip(place, 0, extra - 1)])
    return Text(jnp.where(place < extra, new, old[:, replaced:]), text.padding)


def prompted(model: Model, prefix: Int[Array, "*runs prefix"], replaced: int = 0) -> Model:
    """A model that sees a prefix before its rows [batch, time], and returns logits for the rows' positions only.

    The prefix replaces the first `replaced` tokens of each row. Only the prefix is in `params`. The given
    parameters are frozen, so a model of several runs holds them once.
    """
    base = model.all_params
    nothing = jax.tree.map(lambda leaf: None, base)
    return Model(_Behind(model.apply, replaced), _Prompted(nothing, prefix), _Prompted(base, None))
