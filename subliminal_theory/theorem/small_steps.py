"""How small is small enough: a search for the largest steps at which the theorem's guarantee still holds."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.channel import Channel, imitation_loss, imitation_value_and_grad
from subliminal_theory.model import split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.signal import measure_signal
from subliminal_theory.theorem.setting import (
    Apply,
    Scalar,
    TraitLoss,
    descent,
    of_trainable,
    ratio,
    require_step,
    rounding,
)


@register_dataclass
@dataclass(frozen=True)
class SmallSteps:
    """The result of `how_small`: scalar arrays, in units of the raw gradients.

    Attributes:
        teacher_step: the largest eps such that D_S . D_T >= 0 at all probed steps up to it. 0 if A = 0.
        student_step: the largest alpha such that the trait loss does not rise at any probed step up to it, at the
            given eps. 0 if A = 0.
        teacher_step_searched: the largest eps probed. If `teacher_step` equals it, no failure was found.
        student_step_searched: the same for alpha. Both are 0 if their direction is 0.
    """

    teacher_step: PyTree
    student_step: PyTree
    teacher_step_searched: PyTree
    student_step_searched: PyTree


def how_small(
    apply: Apply,
    params: PyTree,
    trait_loss: TraitLoss,
    inputs: PyTree,
    channel: Channel,
    *,
    teacher_step: Scalar,
    key: Key[Array, ""] | None = None,
    weights: Float[Array, "*batch"] | None = None,
    farthest: float = 10.0,
    probes: int = 48,
) -> SmallSteps:
    """Search the largest teacher and student steps for which the guarantee still holds.

    `teacher_step` is the eps of the teacher while the student's step is searched. The search probes `probes` steps
    on a geometric grid. The grid spans eight decades and ends where a step moves the parameters by `farthest`
    times their norm. The first failure is then bisected to rounding. This is a search, not a bound. It misses a
    failure between two probes if both probes succeed. A negative D_S . D_T or a rise of the trait loss within the
    rounding error does not count as a failure.

    The cost is about 2 * probes + 100 forward passes. Pure: wrap it in `jax.jit`.

    Raises:
        InputError: as `check`.
    """
    require_step("teacher_step", teacher_step)
    logits_of, trait = of_trainable(params, lambda p: apply(p, inputs)), of_trainable(params, trait_loss)
    params, _ = split_trainable(params)
    before, direction = descent(trait, params)
    signal = measure_signal(logits_of, params, direction, channel, weights)
    logits, tangent = signal.logits, signal.tangent
    unsure = signal.rounding(channel)

    def targets_of(eps: Float[Array, ""] | float) -> PyTree:
        return channel.targets(key, logits_of(optax.tree.add_scale(params, eps, direction)))

    def inner_product(eps: Float[Array, ""]) -> Float[Array, ""]:
        """D_S . D_T by the chain rule through the logits, without a gradient in the parameters."""
        loss = lambda z: imitation_loss(channel, z, targets_of(eps), signal.weights)  # noqa: E731
        return unsure - jax.jvp(loss, (logits,), (tangent,))[1]

    _, gradient = imitation_value_and_grad(channel, logits_of, params, targets_of(teacher_step), signal.weights)
    student_direction = optax.tree.scale(-1, gradient)
    noise = rounding(params, logits, before) * jnp.abs(before)

    def progress(alpha: Float[Array, ""]) -> Float[Array, ""]:
        """How far the trait loss has fallen, plus its rounding error."""
        return noise + before - trait(optax.tree.add_scale(params, alpha, student_direction))

    size = farthest * optax.tree.norm(params)
    decades = jnp.logspace(-8, 0, probes, dtype=logits.dtype)
    eps_grid = decades * ratio(size, optax.tree.norm(direction))
    alpha_grid = decades * ratio(size, optax.tree.norm(student_direction))
    found = (_first_failure(inner_product, eps_grid), _first_failure(progress, alpha_grid))
    vanishes = (signal.zero_code > 0) | (optax.tree.norm(direction) == 0)
    teacher_found, student_found = (jnp.where(vanishes, 0, step) for step in found)
    return SmallSteps(teacher_found, student_found, eps_grid[-1], alpha_grid[-1])


def _first_failure(
    gain: Callable[[Float[Array, ""]], Float[Array, ""]], grid: Float[Array, " probes"]
) -> Float[Array, ""]:
    """Where a function first falls below 0 on a grid, bisected; the end of the grid if it never does."""
    # Written so that nan counts as a failure too.
    failed = ~(jax.lax.map(gain, grid) >= 0)
    first = jnp.argmax(failed)
    low = jnp.where(first == 0, 0, grid[first - 1])

    def halve(bracket: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bracket
        middle = (low + high) / 2
        good = gain(middle) >= 0
        return (jnp.where(good, middle, low), jnp.where(good, high, middle)), None

    (low, _), _ = jax.lax.scan(halve, (low, grid[first]), None, length=50)
    return jnp.where(jnp.any(failed), low, grid[-1])
