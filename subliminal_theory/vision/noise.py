"""Noise images that are never stored: a step generates each image from its index."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Batch, epoch_order

Image = Float[Array, "..."]
Shape = tuple[int, ...]
# Variance of a pixel that is uniform in [-1, 1).
_VARIANCE = 1 / 3
_BLOCK, _BLUR = 4, 1.0


def uniform(key: Key[Array, ""], shape: Shape) -> Image:
    """Uniform in [-1, 1) at the full resolution of float32."""
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def uniform_8bit(key: Key[Array, ""], shape: Shape) -> Image:
    """Uniform over the 256 levels -1 + k / 128."""
    return jax.random.bits(key, shape, jnp.uint8).astype(jnp.float32) / 128 - 1


def gaussian(key: Key[Array, ""], shape: Shape) -> Image:
    """Normal pixels with mean 0 and variance 1/3, the variance of uniform pixels."""
    return jax.random.normal(key, shape) * np.float32(np.sqrt(_VARIANCE))


def blocks(key: Key[Array, ""], shape: Shape) -> Image:
    """Blocks of 4 x 4 equal pixels, each block uniform in [-1, 1); `shape` is (height, width)."""
    coarse = uniform(key, tuple(-(-side // _BLOCK) for side in shape))
    return jnp.repeat(jnp.repeat(coarse, _BLOCK, 0), _BLOCK, 1)[: shape[0], : shape[1]]


def blurred(key: Key[Array, ""], shape: Shape) -> Image:
    """Normal pixels, blurred by a Gaussian of standard deviation 1 pixel; `shape` is (height, width).

    The blur wraps around the edges, so all pixels have the same distribution. It is scaled so that the variance of
    a pixel stays 1/3.
    """
    filters = [np.exp(-0.5 * (np.minimum(np.arange(side), side - np.arange(side)) / _BLUR) ** 2) for side in shape]
    circulant = [np.stack([np.roll(f / np.linalg.norm(f), k) for k in range(len(f))]) for f in filters]
    rows, columns = (jnp.asarray(matrix, jnp.float32) for matrix in circulant)
    return rows @ gaussian(key, shape) @ columns.T


LAWS: dict[str, Callable[[Key[Array, ""], Shape], Image]] = {
    law.__name__: law for law in (uniform, uniform_8bit, gaussian, blocks, blurred)
}


@register_dataclass
@dataclass(frozen=True)
class NoiseImages:
    """A fixed set of `images` noise images from one of `LAWS`, in a new order each epoch.

    Image k depends only on the key and k, so memory does not grow with `images`. With `images=None`, no image is
    shown twice. A batch has shape [batch_size, *shape].

    Raises:
        InputError: the law is unknown, or `images` or `batch_size` is below 1.
    """

    shape: Shape = field(metadata={"static": True})
    batch_size: int = field(metadata={"static": True})
    images: int | None = field(default=None, metadata={"static": True})
    law: str = field(default="uniform", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise InputError(f"NoiseImages: unknown law {self.law!r}; there are {', '.join(LAWS)}")
        if self.batch_size < 1 or (self.images is not None and self.images < 1):
            raise InputError(
                f"NoiseImages: images and batch_size must be at least 1, got {self.images}, {self.batch_size}"
            )

    def image(self, key: Key[Array, ""], number: Int[Array, ""]) -> Image:
        """Image `number` of the set that belongs to `key`."""
        return LAWS[self.law](named(named(key, "images"), number), self.shape)

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree:
        """The numbers and weights of the images of every step."""
        if self.images is None:
            number = jnp.arange(steps * self.batch_size).reshape(steps, self.batch_size)
            return number, jnp.ones((steps, self.batch_size))
        return epoch_order(named(key, "order"), self.images, self.batch_size, steps)

    def batch(self, key: Key[Array, ""], entry: PyTree) -> Batch:
        """Generate the images of one step."""
        numbers, weights = entry
        return Batch(jax.vmap(lambda number: self.image(key, number))(numbers), weights)
