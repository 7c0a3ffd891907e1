"""Stable named random keys: the same name gives the same stream on every machine and in every process."""

import hashlib

import jax
import numpy as np
from jaxtyping import Array, Int, Key


def named(key: Key[Array, ""], *names: str | int | np.integer | Int[Array, ""]) -> Key[Array, ""]:
    """Fold names into a key, in order.

    A string enters as the first four bytes of its SHA-256, an integer as itself. A new name therefore never
    changes the streams of the old names, as splitting a key into more parts would.
    """
    for name in names:
        if isinstance(name, str):
            name = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        key = jax.random.fold_in(key, name)
    return key
