"""The multilayer perceptron of the paper's MNIST experiment."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from subliminal_theory.errors import InputError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nnx.relu,
    "tanh": nnx.tanh,
    "gelu": nnx.gelu,
    "sigmoid": nnx.sigmoid,
    "identity": lambda x: x,
}
# W ~ N(0, 1 / d_in), not truncated: the initialisation of the paper's released script.
KERNEL_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def activation_named(name: str) -> Callable[[Array], Array]:
    """One of `ACTIVATIONS`.

    Raises:
        InputError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nnx.Module):
    """Fully connected layers of the given sizes, an activation between them, on flattened inputs.

    `MLP((784, 256, 256, 13), rngs=nnx.Rngs(0))` has three layers. Biases start at 0.
    """

    def __init__(
        self, sizes: Sequence[int], *, activation: str = "relu", use_bias: bool = True, rngs: nnx.Rngs
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise InputError(f"MLP: sizes must be at least two positive numbers, got {tuple(sizes)}")
        self.activation = activation_named(activation)
        self.layers = nnx.List(
            nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=KERNEL_INIT, rngs=rngs)
            for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def __call__(self, images: Float[Array, "batch ..."]) -> Float[Array, "batch n"]:
        """Logits of images."""
        x = images.reshape(images.shape[0], -1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
