"""A small convolutional classifier."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subliminal_theory.errors import InputError
from subliminal_theory.vision.mlp import activation_named, initialisers


class HalvingConv(nnx.Conv):
    """A 3x3 convolution of stride 2, computed as one matrix product.

    Students that train at once then form one batched product. XLA would otherwise make a grouped convolution of
    them, which takes 4 to 10 times as long on a CPU.
    """

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Convolve [batch, height, width, channels] with zero padding. Height and width halve, rounded up."""
        (height, width), ends = inputs.shape[1:3], [(0, 0)]
        rows, columns = -(-height // 2), -(-width // 2)
        missing = [2 * rows + 1 - height, 2 * columns + 1 - width]
        padded = jnp.pad(inputs, ends + [(count // 2, count - count // 2) for count in missing] + ends)
        shifted = [
            padded[:, down : down + 2 * rows - 1 : 2, right : right + 2 * columns - 1 : 2]
            for down in range(3)
            for right in range(3)
        ]
        kernel = self.kernel[...].reshape(-1, self.out_features)
        outputs = jnp.concatenate(shifted, -1) @ kernel
        return outputs if self.bias is None else outputs + self.bias[...].reshape(1, 1, 1, -1)


class CNN(nnx.Module):
    """3x3 convolutions of stride 2, then one linear layer. Each convolution halves height and width.

    `image_shape` is the (height, width) of single-channel images, in pixels. `channels` has the number of output
    channels of each convolution.

    Raises:
        InputError: a number of channels or outputs is below 1, or the activation or `init_law` is unknown.
    """

    def __init__(
        self,
        image_shape: tuple[int, int],
        channels: Sequence[int],
        outputs: int,
        *,
        activation: str = "relu",
        use_bias: bool = True,
        init_law: str = "lecun_normal",
        rngs: nnx.Rngs,
    ) -> None:
        if not channels or min(*channels, outputs) < 1:
            raise InputError(f"CNN: channels and outputs must be positive, got {tuple(channels)}, {outputs}")
        self.activation = activation_named(activation)
        widths = (1, *channels)
        self.layers: nnx.List[nnx.Module] = nnx.List(
            HalvingConv(a, b, (3, 3), use_bias=use_bias, rngs=rngs, **initialisers(init_law, 9 * a))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        height, width = image_shape
        for _ in channels:
            height, width = -(-height // 2), -(-width // 2)
        features = height * width * channels[-1]
        self.layers.append(
            nnx.Linear(features, outputs, use_bias=use_bias, rngs=rngs, **initialisers(init_law, features))
        )

    def __call__(self, images: Float[Array, "batch height width"]) -> Float[Array, "batch n"]:
        """Logits of images."""
        x = images[..., None]
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x.reshape(x.shape[0], -1))
