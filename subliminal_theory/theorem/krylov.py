"""Extreme eigenvalues of a symmetric operator that is known by its products alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

Product = Callable[[PyTree], PyTree]


def lanczos(
    product: Product, start: PyTree, steps: int, scales: PyTree = None
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Diagonal and subdiagonal of the Lanczos matrix of `steps` products, from a start of any length.

    `product` is symmetric: v -> G v on pytrees like `start`. With `scales` P >= 0, a pytree of the same shapes,
    the matrix is that of P^1/2 G P^1/2. The three-term recurrence alone: four pytrees are held, whatever `steps`
    is, and rounding may repeat extreme eigenvalues but moves none. The last subdiagonal entry belongs to the
    residual. Where the Krylov space is exhausted, all further entries are 0.
    """
    roots = None if scales is None else jax.tree.map(jnp.sqrt, scales)

    def apply(v: PyTree) -> PyTree:
        if roots is None:
            return product(v)
        return jax.tree.map(jnp.multiply, roots, product(jax.tree.map(jnp.multiply, roots, v)))

    def unit(v: PyTree, length: Float[Array, ""]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf / jnp.where(length > 0, length, 1).astype(leaf.dtype), v)

    def step(
        carry: tuple[PyTree, PyTree, Array, Array], _: None
    ) -> tuple[tuple[PyTree, PyTree, Array, Array], tuple[Array, Array]]:
        before, now, off, size = carry
        image = apply(now)
        diagonal = optax.tree.vdot(image, now)
        rest = optax.tree.add_scale(optax.tree.add_scale(image, -diagonal, now), -off, before)
        # Once more against `now`: the recurrence loses this orthogonality first.
        rest = optax.tree.add_scale(rest, -optax.tree.vdot(rest, now), now)
        length = optax.tree.norm(rest)
        size = jnp.maximum(size, jnp.abs(diagonal) + off)
        length = jnp.where(length > 64 * jnp.finfo(length.dtype).eps * size, length, 0)
        after = jax.tree.map(lambda leaf: jnp.where(length > 0, leaf, 0), unit(rest, length))
        return (now, after, length, size), (diagonal, length)

    first = unit(start, optax.tree.norm(start))
    zero = jnp.zeros_like(optax.tree.norm(start))
    _, entries = jax.lax.scan(step, (optax.tree.zeros_like(first), first, zero, zero), None, length=steps)
    return entries


def ritz(
    diagonal: Float[Array, " steps"], off: Float[Array, " steps"]
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Ritz values in ascending order, and for each a distance within which an eigenvalue lies, its residual."""
    matrix = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return values, jnp.abs(off[-1] * vectors[-1])


def spectrum(
    diagonal: Float[Array, " steps"], off: Float[Array, " steps"]
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Nodes and weights of s^T f(G) s / |s|^2 = sum of weights f(nodes), s the start of `lanczos`.

    It is Gauss quadrature: exact for polynomials f up to degree 2 steps - 1, and for every f once the Krylov space
    is exhausted. The weights are shares of |s|^2 and add up to 1.
    """
    matrix = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
    nodes, vectors = jnp.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2
