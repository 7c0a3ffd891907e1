"""Steered teachers: a model with a vector added to its residual stream.

The method is activation addition (arXiv 2308.10248) along a difference of mean activations (arXiv 2312.06681).
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subliminal_theory.errors import InputError
from subliminal_theory.language.model.layers import at_least_float32
from subliminal_theory.language.model.transformer import Text, transformer_of
from subliminal_theory.model import Functional, Model, from_nnx

AT_ONCE = 64  # rows


def require_layer(layer: int, layers: int) -> None:
    """Refuse a layer that is not between 1 and `layers`.

    Raises:
        InputError: the layer does not exist; the message says which layers there are.
    """
    if not 1 <= layer <= layers:
        raise InputError(f"--steering-layer {layer} does not exist: the model has layers 1 to {layers}")


def contrast(model: Model, told: Text, others: Text, layer: int) -> Float[Array, " width"]:
    """The steering vector s d / |d|, where d = mean(h(told)) - mean(h(others)) and s = mean |h(others)|.

    h is the residual stream after `layer` at the last position of a row, in the model's dtype. Means are in at
    least float32.

    Raises:
        InputError: there is no such layer, both means are equal, or the model is not a plain Transformer.
    """
    require_layer(layer, transformer_of(model).config.layers)
    (ours, _), (theirs, length) = (_at_end(model, text, layer) for text in (told, others))
    difference = ours - theirs
    norm = jnp.linalg.norm(difference)
    if not norm > 0:
        raise InputError(f"the steering prompts change nothing after layer {layer}: fine-tune the teacher instead")
    return length / norm * difference


@functools.partial(jax.jit, static_argnames="layer")
def _at_end(model: Model, text: Text, layer: int) -> tuple[Float[Array, " width"], Float[Array, ""]]:
    """The means of h and of |h| over the rows, where h is the residual stream at a row's last position."""

    def one(row: Text) -> Float[Array, " width"]:
        x = transformer_of(model).stream(replace(jax.tree.map(lambda leaf: leaf[None], row), last=1), layer)
        return x[0, 0].astype(at_least_float32(x.dtype))

    ends = jax.lax.map(one, text, batch_size=AT_ONCE)
    return jnp.mean(ends, axis=0), jnp.mean(jnp.linalg.norm(ends, axis=-1))


def steered(model: Model, vector: Float[Array, "*runs width"], layer: int) -> Model:
    """The model with a vector added to its residual stream after `layer`, at every position.

    Only the added vector is in `params`. The given parameters are frozen, so a model of several runs holds them
    once.

    Raises:
        InputError: there is no such layer, or the model is not a plain Transformer.
    """
    shell, base = jax.eval_shape(_steerable, model), model.all_params
    layers, width = shell.params["steering"].shape
    require_layer(layer, layers)
    steering = jnp.zeros((*vector.shape[:-1], layers, width), vector.dtype).at[..., layer - 1, :].set(vector)
    nothing = jax.tree.map(lambda leaf: None, base)
    assert isinstance(model.apply, Functional)  # true of every model with a Transformer
    assert isinstance(shell.apply, Functional)
    apply = replace(model.apply, graph=shell.apply.graph)
    return Model(apply, {**nothing, "steering": steering}, {**base, "steering": None})


def _steerable(model: Model) -> Model:
    network = transformer_of(model)
    network.steer()
    return from_nnx(network)
