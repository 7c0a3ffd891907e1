"""A small convolutional classifier."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from subliminal_theory.errors import InputError
from subliminal_theory.vision.mlp import activation_named, initialisers


class CNN(nnx.Module):
    """3x3 convolutions of stride 2, then one linear layer; every spatial size is halved by a layer.

    `image_shape` is (height, width) of single-channel images, `channels` the width of each convolution.
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
            nnx.Conv(a, b, (3, 3), strides=2, use_bias=use_bias, rngs=rngs, **initialisers(init_law, 9 * a))
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
