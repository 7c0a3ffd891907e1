"""Small models for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.transformer import Transformer
from subliminal_theory.model import Model, from_nnx


@functools.cache
def opinionated(config: TransformerConfig, seed: int = 0) -> Model:
    """A model with opinions: logits of size 1."""
    model = jax.eval_shape(lambda: from_nnx(Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(leaf) -> jax.Array:
        size = rng.normal(size=leaf.shape) * (0.1 if leaf.ndim == 1 else leaf.shape[0] ** -0.5)
        return jnp.asarray(size + (leaf.ndim == 1), jnp.float32)

    return model.with_params(jax.tree.map(draw, model.params))
