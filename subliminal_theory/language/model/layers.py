"""The layers of a language model that act on one position at a time."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.pytree import register_dataclass


def at_least_float32(dtype: Any) -> Any:
    """The dtype of norms, rotations, softmaxes and logits: `dtype`, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


@register_dataclass
@dataclass(frozen=True)
class Factored:
    """A matrix with LoRA factors, in place of the matrix. Paths to the parts end in `/base`, `/a` and `/b`.

    In a model's `params` and `frozen`, each part is None in the tree that does not hold it. If only some layers
    have factors, `a` and `b` are tuples with None for the others. A layer receives all three parts, with the scale
    multiplied into `b`. It computes x base + (x a) b. The gradient in `a` and `b` then does not need the gradient
    in the whole matrix, which would be a third of the work.
    """

    base: Float[Array, "*layers inputs outputs"] | None
    a: Float[Array, "*layers inputs rank"] | tuple[Any, ...] | None
    b: Float[Array, "*layers rank outputs"] | tuple[Any, ...] | None


Matrix = Float[Array, "inputs outputs"] | Factored


def multiply(x: Float[Array, "batch time inputs"], matrix: Matrix) -> Array:
    """x @ matrix as one product of matrices. On a CPU, the gradient of a batched product takes twice as long."""
    flat = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    if isinstance(matrix, Factored):
        base, a, b = (part.astype(x.dtype) for part in jax.tree.leaves(matrix))
        product = jnp.matmul(flat, base) + jnp.matmul(jnp.matmul(flat, a), b)
    else:
        product = jnp.matmul(flat, matrix)
    return product.reshape(*x.shape[:2], product.shape[1])


def wide_product(x: Float[Array, "rows inputs"], matrix: Float[Array, "inputs outputs"]) -> Array:
    """x @ matrix in at least float32."""
    wide = at_least_float32(x.dtype)
    return jnp.matmul(x, matrix) if x.dtype == wide else _wide_product(x, matrix)


@jax.custom_vjp
def _wide_product(x: Array, matrix: Array) -> Array:
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def _wide_forward(x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide_product(x, matrix), (x, matrix)


def _wide_backward(read: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    # Gradients stay in the dtype of x. Otherwise both products would have float32 operands.
    x, matrix = read
    slope = slope.astype(x.dtype)
    return jnp.matmul(slope, matrix.T), jnp.matmul(x.T, slope)


_wide_product.defvjp(_wide_forward, _wide_backward)


def normal(rngs: nnx.Rngs, shape: tuple[int, int], variance: float) -> Float[Array, "inputs outputs"]:
    """Draws from N(0, variance) in float32."""
    return variance**0.5 * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """x @ kernel + bias. The kernel starts as draws from N(0, gain / inputs), the bias (if any) as 0."""

    def __init__(
        self, inputs: int, outputs: int, gain: float = 1.0, *, bias: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs), gain / inputs))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time outputs"]:
        """x @ kernel + bias at each position."""
        product = multiply(x, self.kernel.get_value())
        return product if self.bias is None else product + self.bias[...][None, None]


class Joined(Linear):
    """Several linear layers with the same input, computed as one product. `apart` returns the output of each.

    Its parameters are copies. It is for inference, not for training.
    """

    def __init__(self, *parts: Linear) -> None:
        biases = [part.bias[...] for part in parts if part.bias is not None]
        kernels = [part.kernel[...] for part in parts]
        self.kernel = nnx.Param(jnp.concatenate(kernels, axis=-1))
        self.bias = nnx.Param(jnp.concatenate(biases, axis=-1)) if biases else None
        self.cuts = tuple(np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1].tolist())

    def apart(self, x: Float[Array, "batch time inputs"]) -> list[Float[Array, "batch time outputs_of_one"]]:
        """The output of each layer."""
        return jnp.split(self(x), self.cuts, axis=-1)


class RMSNorm(nnx.Module):
    """(offset + scale) * x / sqrt(mean(x^2) + epsilon) over the last axis. offset + scale starts as 1."""

    def __init__(self, width: int, epsilon: float, offset: bool = False) -> None:
        self.scale = nnx.Param(jnp.full(width, 0.0 if offset else 1.0, jnp.float32))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The normalized activations in the dtype of x."""
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
        """The normalized activations in the dtype of x."""
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
    """down(f(gate(x)) * up(x)), or down(f(up(x))) without a gate."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        sides = (config.width, config.mlp_width)
        self.activation = config.activation
        self.gate = Linear(*sides, bias=config.mlp_bias, rngs=rngs) if config.gated else None
        self.up = Linear(*sides, bias=config.mlp_bias, rngs=rngs)
        self.down = Linear(*sides[::-1], 0.5 / config.layers, bias=config.mlp_bias, rngs=rngs)
        self.joined: Joined | None = None

    def join(self) -> None:
        """From now on, compute gate and up as one product."""
        if self.gate is not None:
            self.joined = nnx.data(Joined(self.gate, self.up))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """The output at each position."""
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activate(self.up(x)))
        if self.joined is not None:
            gate, up = self.joined.apart(x)
            return self.down(activate(gate) * up)
        return self.down(activate(self.gate(x)) * self.up(x))
