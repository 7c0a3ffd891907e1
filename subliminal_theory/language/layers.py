"""The parts of a language model that look at one position at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subliminal_theory.language.config import TransformerConfig


def at_least_float32(dtype: Any) -> Any:
    """The format of norms, rotations, softmaxes and logits."""
    return jnp.promote_types(dtype, jnp.float32)


def multiply(x: Float[Array, "batch time inputs"], matrix: Float[Array, "inputs outputs"], dtype: Any) -> Array:
    """x @ matrix as one product of matrices: the gradient of a batched one takes twice as long on a CPU."""
    flat = jnp.matmul(x.reshape(x.shape[0] * x.shape[1], matrix.shape[0]), matrix, preferred_element_type=dtype)
    return flat.reshape(*x.shape[:2], matrix.shape[1])


def normal(rngs: nnx.Rngs, shape: tuple[int, int], variance: float) -> Float[Array, "inputs outputs"]:
    """Draws from N(0, variance)."""
    return variance**0.5 * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """x @ kernel + bias; the kernel starts as N(0, gain / inputs), the bias, if any, at 0."""

    def __init__(
        self, inputs: int, outputs: int, gain: float = 1.0, *, bias: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs), gain / inputs))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time outputs"]:
        """The product, of each position alone."""
        product = multiply(x, self.kernel[...], None)
        return product if self.bias is None else product + self.bias[...][None, None]


class RMSNorm(nnx.Module):
    """(offset + scale) * x / sqrt(mean(x^2) + epsilon) over the last axis; offset + scale starts at 1."""

    def __init__(self, width: int, epsilon: float, offset: bool = False) -> None:
        self.scale = nnx.Param(jnp.full(width, 0.0 if offset else 1.0, jnp.float32))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The normalised activations in the format of x."""
        wide = x.astype(at_least_float32(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...].astype(wide.dtype) + self.offset
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """scale * (x - mean(x)) / sqrt(variance(x) + epsilon) + bias over the last axis."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """The normalised activations in the format of x."""
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...][None, None]
        return (normed + self.bias[...][None, None]).astype(x.dtype)


def make_norm(config: TransformerConfig) -> RMSNorm | LayerNorm:
    """A norm of the residual stream."""
    if config.norm == "layer":
        return LayerNorm(config.width, config.norm_epsilon)
    return RMSNorm(config.width, config.norm_epsilon, config.norm_offset)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nnx.Module):
    """down(f(gate(x)) * up(x)), or without a gate down(f(up(x)))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        sides = (config.width, config.mlp_width)
        self.activation = config.activation
        self.gate = Linear(*sides, bias=config.mlp_bias, rngs=rngs) if config.gated else None
        self.up = Linear(*sides, bias=config.mlp_bias, rngs=rngs)
        self.down = Linear(*sides[::-1], 0.5 / config.layers, bias=config.mlp_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """One position at a time."""
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activate(self.up(x)))
        return self.down(activate(self.gate(x)) * self.up(x))
