"""The multilayer perceptron of the paper's MNIST experiment."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from subliminal_theory.errors import InputError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nnx.relu,
    "tanh": nnx.tanh,
    "gelu": nnx.gelu,
    "sigmoid": nnx.sigmoid,
    "identity": lambda x: x,
}
_scaled = jax.nn.initializers.variance_scaling
# Kernel initializers by name. All but the last set biases to 0.
INIT_LAWS = {
    "lecun_normal": _scaled(1.0, "fan_in", "normal"),  # N(0, 1 / d_in), not truncated: the paper's script
    "he_normal": _scaled(2.0, "fan_in", "normal"),
    "glorot_uniform": _scaled(1.0, "fan_avg", "uniform"),
    "torch": _scaled(1 / 3, "fan_in", "uniform"),  # uniform within +- 1 / sqrt(d_in), as are the biases
}


def initialisers(init_law: str, inputs: int) -> dict[str, Any]:
    """The arguments `kernel_init` and `bias_init` for a layer whose neurons have `inputs` inputs each.

    Raises:
        InputError: the law is unknown.
    """
    if init_law not in INIT_LAWS:
        raise InputError(f"unknown initialization {init_law!r}; there are {', '.join(INIT_LAWS)}")
    bound = 1 / math.sqrt(inputs)

    def uniform(key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    zeros = jax.nn.initializers.zeros
    return {"kernel_init": INIT_LAWS[init_law], "bias_init": uniform if init_law == "torch" else zeros}


def activation_named(name: str) -> Callable[[Array], Array]:
    """One of `ACTIVATIONS`.

    Raises:
        InputError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nnx.Module):
    """Fully connected layers of the given sizes with activations between them, on flattened inputs.

    `MLP((784, 256, 256, 13), rngs=nnx.Rngs(0))` has three layers. `init_law` is one of `INIT_LAWS`.

    Raises:
        InputError: there are fewer than two sizes, a size is below 1, or the activation or `init_law` is unknown.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: str = "relu",
        use_bias: bool = True,
        init_law: str = "lecun_normal",
        rngs: nnx.Rngs,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise InputError(f"MLP: sizes must be at least two positive numbers, got {tuple(sizes)}")
        self.activation = activation_named(activation)
        self.layers = nnx.List(
            nnx.Linear(inputs, outputs, use_bias=use_bias, rngs=rngs, **initialisers(init_law, inputs))
            for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def __call__(self, images: Float[Array, "batch ..."]) -> Float[Array, "batch n"]:
        """Logits of images."""
        x = images.reshape(images.shape[0], -1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
