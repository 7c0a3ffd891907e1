"""What carries a trait during a whole run: the angles between the student, the teacher and the trait gradient.

    observe = follow(trait_gradient, start, teacher)
    distill(..., observe=observe).observed     # the cosines of every step

Coverage is the cosine between a student's FIRST update and its teacher's displacement. It is known before the
student is trained (arXiv 2606.22019). The theorem is exact for a `linearised` student: the first-order expansion
in its parameters, which trains as the empirical tangent kernel does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from subliminal_theory.distill import Observe, Step
from subliminal_theory.errors import InputError
from subliminal_theory.model import Apply, Model


def inner(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Inner product of two parameter pytrees."""
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def cosine(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Cosine of the angle between two parameter pytrees; 0 if either of them is 0."""
    length = jnp.sqrt(inner(a, a)) * jnp.sqrt(inner(b, b))
    return jnp.where(length > 0, inner(a, b) / jnp.where(length > 0, length, 1), 0)


def difference(a: PyTree, b: PyTree) -> PyTree:
    """a - b, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def follow(trait_gradient: Callable[[PyTree], PyTree], start: PyTree, teacher: PyTree) -> Observe:
    """An observer for `distill` that computes three cosines before each step.

    `gradient`: between the student's gradient and the gradient of the trait loss at the student's parameters;
    `update`: between the student's update and the teacher's displacement (coverage, at the first step);
    `displacement`: between the student's and the teacher's displacements from `start`, the teacher's start.
    It only measures: the trait loss never reaches the student.
    """
    taught = difference(teacher, start)

    def observe(step: Step) -> PyTree:
        params = step.model.params
        return {
            "gradient": cosine(step.gradient, trait_gradient(params)),
            "update": cosine(step.update, taught),
            "displacement": cosine(difference(params, start), taught),
        }

    return observe


def project_out(direction: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Remove the component along d = `direction(params)` from each update: u - (u . d) d / (d . d).

    Chain it after an optimizer. If d is the trait gradient, no step changes the trait loss to first order.
    """

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree) -> tuple[PyTree, optax.EmptyState]:
        d = direction(params)
        squared = inner(d, d)
        share = jnp.where(squared > 0, inner(updates, d) / jnp.where(squared > 0, squared, 1), 0)
        return jax.tree.map(lambda u, leaf: u - share * leaf, updates, d), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclass(frozen=True)
class _Linearised:
    """f(p0, x) + J(p0, x) (p - p0) for params {"origin": p0, "moved": p}; equal for equal networks."""

    apply: Apply

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        origin, moved = params["origin"], params["moved"]
        value, change = jax.jvp(lambda p: self.apply(p, inputs), (origin,), (difference(moved, origin),))
        return value + change


def linearised(model: Model) -> Model:
    """The first-order expansion of a model around its own parameters. It trains like any other model.

    A call takes one jvp; no Jacobian or kernel is built. Exact for networks that are linear in their parameters.

    Raises:
        InputError: the model has frozen parameters.
    """
    if model.frozen is not None:
        raise InputError("linearised expands in all parameters: give it a model without frozen ones")
    nothing = jax.tree.map(lambda leaf: None, model.params)
    return Model(
        _Linearised(model.apply),
        {"origin": nothing, "moved": model.params},
        {"origin": model.params, "moved": nothing},
    )
