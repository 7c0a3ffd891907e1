"""The extreme eigenvalues of a symmetric matrix, from its products with vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

Product = Callable[[PyTree], PyTree]


def lanczos(
    product: Product, start: PyTree, steps: int, scales: PyTree = None
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """The diagonal and the subdiagonal of the Lanczos matrix after `steps` products.

    `product` is v -> G v for a symmetric G, on pytrees like `start`. `start` may have any norm. With `scales`, the
    diagonal of P >= 0 as a pytree of the same shapes, the matrix is P^1/2 G P^1/2 instead of G. Only the
    three-term recurrence is used, so four pytrees are in memory for any number of steps. Rounding may repeat
    extreme eigenvalues but does not move them. The last subdiagonal entry is the norm of the residual. Once the
    Krylov space is exhausted, all further entries are 0.
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
        # Orthogonalize against `now` once more: the recurrence loses this orthogonality first.
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
    """The Ritz values in ascending order, and the residual of each: an eigenvalue lies within that distance."""
    values, vectors = _eigh(diagonal, off)
    return values, jnp.abs(off[-1] * vectors[-1])


def spectrum(
    diagonal: Float[Array, " steps"], off: Float[Array, " steps"]
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Nodes and weights of s^T f(G) s / |s|^2 = sum of weights f(nodes), s the start of `lanczos`.

    It is Gauss quadrature: exact for polynomials f up to degree 2 steps - 1, and for every f once the Krylov space
    is exhausted. The weights are shares of |s|^2 and add up to 1.
    """
    nodes, vectors = _eigh(diagonal, off)
    return nodes, vectors[0] ** 2


def _eigh(
    diagonal: Float[Array, " steps"], off: Float[Array, " steps"]
) -> tuple[Float[Array, " steps"], Float[Array, "steps steps"]]:
    """Eigenvalues and eigenvectors of the Lanczos matrix."""
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1))
    return values, vectors
