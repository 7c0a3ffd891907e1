"""Noise images that are never stored: each is made anew from its number whenever a step needs it."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.source import Batch, epoch_order


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UniformNoise:
    """A fixed set of `images` noise images, uniform in [-1, 1), in a new order each epoch.

    Image k is a function of the key and k alone, so memory does not grow with `images`. With
    `images=None` no image is ever shown twice. `bits` is the number of random bits a pixel: 32 is the
    full float32 resolution of `jax.random.uniform`, 8 has the levels -1 + k / 128.

    Raises:
        InputError: bits other than 8 or 32, or a count below 1.
    """

    shape: tuple[int, ...] = field(metadata={"static": True})
    batch_size: int = field(metadata={"static": True})
    images: int | None = field(default=None, metadata={"static": True})
    bits: int = field(default=32, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.bits not in (8, 32):
            raise InputError(f"UniformNoise: bits must be 8 or 32, got {self.bits}")
        if self.batch_size < 1 or (self.images is not None and self.images < 1):
            raise InputError(
                f"UniformNoise: images and batch_size must be at least 1, got {self.images}, {self.batch_size}"
            )

    def image(self, key: Key[Array, ""], number: Int[Array, ""]) -> Float[Array, "..."]:
        """Image `number` of the set that the source's key names."""
        key = named(named(key, "images"), number)
        if self.bits == 8:
            return jax.random.bits(key, self.shape, jnp.uint8).astype(jnp.float32) / 128 - 1
        return jax.random.uniform(key, self.shape, minval=-1.0, maxval=1.0)

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree:
        """The numbers of the images of every step, and their weights."""
        if self.images is None:
            number = jnp.arange(steps * self.batch_size).reshape(steps, self.batch_size)
            return number, jnp.ones((steps, self.batch_size))
        return epoch_order(named(key, "order"), self.images, self.batch_size, steps)

    def batch(self, key: Key[Array, ""], entry: PyTree) -> Batch:
        """Draw the images of one step."""
        numbers, weights = entry
        return Batch(jax.vmap(lambda number: self.image(key, number))(numbers), weights)
