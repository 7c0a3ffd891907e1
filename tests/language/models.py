"""Small models for tests."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.transformer import Transformer
from subliminal_theory.model import Model, from_nnx, names_of, of_layers, shapes_of


def drawn(like: Any, draw: Callable[[str, tuple[int, ...]], Any]) -> Any:
    """Parameters of these shapes; `draw(name, shape)` gives each, and those of layers layer after layer."""
    shapes = shapes_of(like)
    in_order = sorted(shapes, key=lambda name: [int(part) if part.isdigit() else part for part in name.split("/")])
    made = {name: draw(name, shapes[name]) for name in in_order}

    def one(path, leaf) -> jax.Array:
        own = [made[name] for name in names_of(path, leaf)]
        return jnp.stack(own) if of_layers(path) else own[0]

    return jax.tree_util.tree_map_with_path(one, like)


def layer_of(params: Any, layer: int) -> Any:
    """The parameters of one layer."""
    return jax.tree.map(lambda leaf: leaf[layer], params["layers"]["*"])


@functools.cache
def opinionated(config: TransformerConfig, seed: int = 0) -> Model:
    """A model with opinions: logits of size 1."""
    model = jax.eval_shape(lambda: from_nnx(Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        size = rng.normal(size=shape) * (0.1 if len(shape) == 1 else shape[0] ** -0.5)
        return jnp.asarray(size + (len(shape) == 1), jnp.float32)

    return model.with_params(drawn(model.params, draw))
