"""Parts that all statements of the theorem share: trainable parameters, directions, step sizes and rounding."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.model import join, split_trainable

Apply = Callable[[PyTree, PyTree], Float[Array, "*batch n"]]
TraitLoss = Callable[[PyTree], Float[Array, ""]]
T = TypeVar("T")
Scalar = float | Float[Array, ""]


def require_step(name: str, step: Scalar) -> None:
    """Refuse a step size that is not positive and finite. Traced values pass.

    Raises:
        InputError: the step size is not positive and finite.
    """
    if not isinstance(step, jax.core.Tracer) and not 0 < float(step) < math.inf:
        raise InputError(f"{name} must be a positive, finite number, got {float(step)}")


def of_trainable(params: PyTree, function: Callable[[PyTree], T]) -> Callable[[PyTree], T]:
    """The same function of only the parameters that have a gradient; the others keep their values in `params`."""
    _, rest = split_trainable(params)
    return lambda trained: function(join(trained, rest))


def descent(loss: TraitLoss, params: PyTree) -> tuple[Float[Array, ""], PyTree]:
    """The loss and minus its gradient.

    Raises:
        InputError: the loss is not a scalar.
    """
    shape = jax.eval_shape(loss, params).shape
    if shape != ():
        raise InputError(f"the trait loss must be a scalar, got shape {shape}")
    value, gradient = jax.value_and_grad(loss)(params)
    return value, optax.tree.scale(-1, gradient)


def teacher_direction(
    trait: TraitLoss | None, direction: PyTree, params: PyTree
) -> tuple[Float[Array, ""], PyTree]:
    """The trait loss and D_T. D_T is minus the gradient of the loss, or the given direction; the loss is then nan.

    `params` are the trainable parameters. D_T has their dtypes.

    Raises:
        InputError: both or neither are given; the loss is not a scalar; the direction does not match the
            parameters.
    """
    if (trait is None) == (direction is None):
        given = "neither" if trait is None else "both"
        raise InputError(f"the teacher needs a trait loss or a direction, got {given}")
    if trait is not None:
        return descent(trait, params)
    given, _ = split_trainable(direction)
    if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, params):
        raise InputError("direction must have the structure and shapes of params")
    return jnp.asarray(jnp.nan), jax.tree.map(lambda d, leaf: jnp.asarray(d, leaf.dtype), given, params)


def ratio(a: Float[Array, ""], b: Float[Array, ""]) -> Float[Array, ""]:
    """a / b if b > 0, otherwise 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def rounding(*trees: PyTree) -> float:
    """16 times the largest machine epsilon among the leaves, which must be floating-point."""
    return 16 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trees))


def kept(start: PyTree, end: PyTree, step: Scalar, direction: PyTree) -> Float[Array, ""]:
    """The share of a step that remains after rounding: (end - start) . direction / (step |direction|^2)."""
    # Squares of small directions underflow, so the direction is scaled to a largest entry of 1.
    largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf), initial=0), direction))
    unit = jax.tree.map(lambda leaf: leaf / jnp.where(largest > 0, largest, 1).astype(leaf.dtype), direction)
    displacement = jax.tree.map(lambda a, b, u: (b - a) / jnp.asarray(step * largest, u.dtype), start, end, unit)
    squared = optax.tree.vdot(unit, unit)
    return jnp.where(squared > 0, optax.tree.vdot(displacement, unit) / jnp.where(squared > 0, squared, 1), 1)
