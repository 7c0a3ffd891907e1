"""Prompt tuning (arXiv 2104.08691): a few rows of the embedding train, those of the tokens of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.model import Apply, BodyAndHead, Model
from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Planted:
    """An embedding and some rows in the place of its own: paths end in `/base` and `/rows`.

    Among the parameters of a model, each is None in the one of `params` and `frozen` that does not hold it.
    """

    base: Float[Array, "vocabulary width"] | None
    rows: Float[Array, "tokens width"] | None


@dataclass(frozen=True)
class SoftPrompt:
    """The function of a model with other embeddings of some tokens; equal for equal functions and tokens."""

    apply: Apply
    tokens: tuple[int, ...]

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        return self.apply(self.merged(params), inputs)

    def features(self, params: PyTree, inputs: PyTree) -> Float[Array, "batch ... width"]:
        assert isinstance(self.apply, BodyAndHead)
        return self.apply.features(self.merged(params), inputs)

    def readout(self, params: PyTree, features: Float[Array, "... width"]) -> Float[Array, "... n"]:
        assert isinstance(self.apply, BodyAndHead)
        return self.apply.readout(self.merged(params), features)

    def merged(self, params: PyTree) -> PyTree:
        """Parameters of `apply`: the rows in their places."""
        planted = params["embedding"]
        rows = planted.rows.astype(planted.base.dtype)
        return {**params, "embedding": planted.base.at[jnp.asarray(self.tokens)].set(rows)}


def soft_prompt(model: Model, tokens: Sequence[int]) -> Model:
    """The same function, of which only the embeddings of these tokens train. All else is frozen.

    If the embedding is also the output matrix, the logits of these tokens move with their embeddings.

    Raises:
        InputError: no token, a repeated token, one that the embedding does not have, or a model without an
            embedding of its own (merge its low-rank factors first).
    """
    everything = model.all_params
    embedding = everything.get("embedding") if isinstance(everything, dict) else None
    if not isinstance(embedding, jax.Array):
        raise InputError("soft_prompt: the model has no plain embedding: take a language model without factors")
    if not tokens or len(set(tokens)) < len(tokens):
        raise InputError(f"soft_prompt: tokens must be at least one, and different, got {list(tokens)}")
    if outside := [token for token in tokens if not 0 <= token < len(embedding)]:
        raise InputError(f"soft_prompt: token {outside[0]} is none of the {len(embedding)} of the embedding")
    rows = embedding[jnp.asarray(tokens)].astype(jnp.promote_types(embedding.dtype, jnp.float32))
    nothing: Any = jax.tree.map(lambda leaf: None, everything)
    return Model(
        SoftPrompt(model.apply, tuple(tokens)),
        {**nothing, "embedding": Planted(None, rows)},
        {**everything, "embedding": Planted(embedding, None)},
    )


def without_soft_prompt(model: Model) -> Model:
    """A plain model with the rows in its embedding, all of it trainable; a model without rows as it is."""
    if not isinstance(model.apply, SoftPrompt):
        return model
    return replace(model, apply=model.apply.apply, params=model.apply.merged(model.all_params), frozen=None)
