"""Lemma 1 and Theorem 1 of doi 10.1038/s41586-026-10319-8, on any differentiable function.

A teacher takes one step, theta_T = theta_0 + eps D_T with D_T = -grad L_T(theta_0) for any trait loss L_T.
A student at the same theta_0 takes one gradient step of size alpha on the imitation loss; D_S is minus its
gradient. With J the Jacobian of the logits at theta_0 and M the metric of the channel,

    D_S . D_T = eps A + O(eps^2),   A = mean over positions of (J D_T)^T M (J D_T) >= 0,
    L_T(theta_0 + alpha D_S) - L_T(theta_0) = -eps alpha A + O(eps^2 alpha + eps^2 alpha^2).

Everything here is matrix-free: gradients and Jacobian-vector products, never J or M.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.channel import Channel, imitation_loss, imitation_value_and_grad, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.model import join, split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.signal import ZERO_CASES, measure_signal, signs

_MEASURED = (
    *("inner_product", "predicted_inner_product", "cosine", "teacher_norm", "student_norm"),
    *("trait_loss_before", "trait_loss_after", "predicted_change"),
)


@register_dataclass
@dataclass(frozen=True)
class Report:
    """What `check` measured; every number is a scalar array, so a report can come out of jit and vmap.

    Attributes:
        inner_product: D_S . D_T as measured.
        predicted_inner_product: eps A.
        cosine: of D_S and D_T (0 if either vanishes).
        teacher_norm: |D_T|.
        student_norm: |D_S|.
        trait_loss_before: L_T at the student's initialisation.
        trait_loss_after: L_T after the student's step.
        predicted_change: -eps alpha A, the leading order of after - before.
        change_rounding: 16 eps |L_T|, eps of the coarsest dtype at work: a smaller change has no sign.
        teacher_kept: the share of the teacher's step that its parameters' dtype keeps: near 1, or 0 if
            theta + eps D_T rounds to theta.
        student_kept: the same for the student's step.
        zero_code: which of `ZERO_CASES` makes A vanish, 0 for none.
        unupdated_cosine: cosine of D_S and the direction that imitates the teacher before its step; nan
            for a shared initialisation, where that direction is 0. It tends to 1 with eps otherwise.
        unupdated_inner_product: that direction times D_T, the leading order of D_S . D_T for a
            different initialisation, where eps A is not.
        same_initialisation: whether the theorem covers the case.
        exact: whether the channel is exact; if not, the theorem holds on average over the targets only.
    """

    inner_product: PyTree
    predicted_inner_product: PyTree
    cosine: PyTree
    teacher_norm: PyTree
    student_norm: PyTree
    trait_loss_before: PyTree
    trait_loss_after: PyTree
    predicted_change: PyTree
    change_rounding: PyTree
    teacher_kept: PyTree
    student_kept: PyTree
    zero_code: PyTree
    unupdated_cosine: PyTree
    unupdated_inner_product: PyTree
    same_initialisation: bool = field(metadata={"static": True})
    exact: bool = field(default=True, metadata={"static": True})

    @property
    def change(self) -> PyTree:
        """L_T after the student's step minus before."""
        return self.trait_loss_after - self.trait_loss_before

    @property
    def zero_case(self) -> str:
        """Why A vanishes, or the empty string."""
        return ZERO_CASES[int(self.zero_code)]

    @property
    def verdict(self) -> str:
        """`descends`, `orthogonal` or `step too large`; or why the case decides nothing, and what to do."""
        if broken := [name for name in self._numbers if not math.isfinite(float(getattr(self, name)))]:
            return f"not finite: {', '.join(broken)}; use smaller steps"
        if not self.same_initialisation:
            return "different initialisation"
        if self.zero_case:
            return "orthogonal"
        for name in ("teacher", "student"):
            if float(getattr(self, f"{name}_kept")) < 0.5:
                return f"step lost to rounding: the {name}'s; use float64 or a larger step"
        if abs(float(self.change)) <= float(self.change_rounding):
            return "below rounding: use float64 or larger steps"
        if not self.exact:
            return "single draw: one draw of targets decides nothing; average over keys"
        return "descends" if float(self.change) < 0 else "step too large"

    @property
    def _numbers(self) -> list[str]:
        unupdated = [] if self.same_initialisation else ["unupdated_cosine", "unupdated_inner_product"]
        return [*_MEASURED, *unupdated]

    def __str__(self) -> str:
        lines = [
            f"verdict                  {self.verdict}" + (f" ({self.zero_case})" if self.zero_case else ""),
            f"D_S . D_T                {float(self.inner_product):+.6e}",
            f"  predicted, eps A       {float(self.predicted_inner_product):+.6e}",
            f"cosine                   {float(self.cosine):+.6f}",
            f"trait loss before        {float(self.trait_loss_before):.9g}",
            f"change                   {float(self.change):+.6e}",
            f"  predicted, -eps alpha A {float(self.predicted_change):+.6e}",
        ]
        if not self.same_initialisation:
            lines.append(f"cosine with imitating the un-updated teacher {float(self.unupdated_cosine):+.6f}")
        return "\n".join(lines)


def check(
    apply: Callable[[PyTree, PyTree], Float[Array, "*batch n"]],
    params: PyTree,
    trait_loss: Callable[[PyTree], Float[Array, ""]],
    inputs: PyTree,
    channel: Channel,
    *,
    teacher_step: float | Float[Array, ""],
    student_step: float | Float[Array, ""],
    key: Key[Array, ""] | None = None,
    weights: Float[Array, "*batch"] | None = None,
    student_params: PyTree | None = None,
) -> Report:
    """Take the two steps of the theorem on a user's own function and compare them with its prediction.

    `apply(params, inputs)` gives logits [*batch, n]; `trait_loss(params)` is any differentiable scalar;
    `teacher_step` is eps and `student_step` alpha, in units of the raw gradients. `weights` [*batch] are
    those of the reduction, 1 by default. With `student_params` the student starts elsewhere and the
    teacher does not: the theorem then promises nothing, and the report says what the student imitates.

    Parameters without a gradient (integers, booleans, random keys) stay as they are. Costs two gradients and two
    Jacobian-vector products (three gradients and two with `student_params`) and keeps a few copies of the
    parameters. Pure: wrap it in `jax.jit` for large models. Exact up to rounding; run it in float64 to see orders
    in eps.

    Raises:
        InputError: a step that is not positive and finite, a trait loss that is no scalar, a channel
            whose logits do not exist or that has no output metric, a metric or visible logits that its loss
            contradicts (judged where they are not traced), or unlike parameter trees.
    """
    for name, step in (("teacher_step", teacher_step), ("student_step", student_step)):
        require_step(name, step)
    same = student_params is None
    student_params = params if same else student_params
    if jax.tree.map(jnp.shape, student_params) != jax.tree.map(jnp.shape, params):
        raise InputError("student_params must have the structure and shapes of params")
    params, logits_of, trait = _of_trainable(params, apply, inputs, trait_loss)
    student, student_logits, student_trait = _of_trainable(student_params, apply, inputs, trait_loss)
    loss_before, direction = _descent(trait, params)
    signal = measure_signal(logits_of, params, direction, channel, weights)
    weights = signal.weights

    def student_step_on(targets: PyTree) -> PyTree:
        _, gradient = imitation_value_and_grad(channel, student_logits, student, targets, weights)
        return optax.tree.scale(-1, gradient)

    teacher = optax.tree.add_scale(params, teacher_step, direction)
    student_direction = student_step_on(channel.targets(key, logits_of(teacher)))
    inner = optax.tree.vdot(student_direction, direction)
    teacher_norm, student_norm = optax.tree.norm(direction), optax.tree.norm(student_direction)

    unupdated_cosine = unupdated_inner = jnp.full_like(inner, jnp.nan)
    if not same:
        unupdated = student_step_on(channel.targets(key, signal.logits))
        unupdated_inner = optax.tree.vdot(unupdated, direction)
        overlap = optax.tree.vdot(student_direction, unupdated)
        unupdated_cosine = _ratio(overlap, student_norm * optax.tree.norm(unupdated))

    moved = optax.tree.add_scale(student, student_step, student_direction)
    before, after = loss_before if same else student_trait(student), student_trait(moved)
    return Report(
        inner_product=inner,
        predicted_inner_product=teacher_step * signal.strength,
        cosine=_ratio(inner, student_norm * teacher_norm),
        teacher_norm=teacher_norm,
        student_norm=student_norm,
        trait_loss_before=before,
        trait_loss_after=after,
        predicted_change=-teacher_step * student_step * signal.strength,
        change_rounding=_rounding(params, signal.logits, before) * jnp.maximum(jnp.abs(before), jnp.abs(after)),
        teacher_kept=_kept(params, teacher, teacher_step, direction),
        student_kept=_kept(student, moved, student_step, student_direction),
        zero_code=jnp.where(teacher_norm == 0, 1, signal.zero_code),
        unupdated_cosine=unupdated_cosine,
        unupdated_inner_product=unupdated_inner,
        same_initialisation=same,
        exact=channel.exact,
    )


def require_step(name: str, step: float | Float[Array, ""]) -> None:
    """Refuse a step size that is not positive and finite.

    Raises:
        InputError: names the step and its value.
    """
    if not isinstance(step, jax.core.Tracer) and not 0 < float(step) < math.inf:
        raise InputError(f"{name} must be a positive, finite number, got {float(step)}")


def _of_trainable(
    params: PyTree,
    apply: Callable[[PyTree, PyTree], Float[Array, "*batch n"]],
    inputs: PyTree,
    trait_loss: Callable[[PyTree], Float[Array, ""]],
) -> tuple[PyTree, Callable[[PyTree], Float[Array, "*batch n"]], Callable[[PyTree], Float[Array, "..."]]]:
    """The parameters that have a gradient; logits and trait loss as functions of these."""
    trained, rest = split_trainable(params)
    return trained, lambda p: apply(join(p, rest), inputs), lambda p: trait_loss(join(p, rest))


def _descent(loss: Callable[[PyTree], Float[Array, ""]], params: PyTree) -> tuple[Float[Array, ""], PyTree]:
    """The loss and minus its gradient."""
    shape = jax.eval_shape(loss, params).shape
    if shape != ():
        raise InputError(f"the trait loss must be a scalar, got shape {shape}")
    value, gradient = jax.value_and_grad(loss)(params)
    return value, optax.tree.scale(-1, gradient)


def _ratio(a: Float[Array, ""], b: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _rounding(*trees: PyTree) -> float:
    """16 times the largest machine epsilon among the floating leaves."""
    return 16 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trees))


def _kept(start: PyTree, end: PyTree, step: float | Float[Array, ""], direction: PyTree) -> Float[Array, ""]:
    """(end - start) . direction / (step |direction|^2): how much of a step remains after rounding."""
    # Squares of small directions underflow, so the direction is scaled to a largest entry of 1.
    largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf), initial=0), direction))
    unit = jax.tree.map(lambda leaf: leaf / jnp.where(largest > 0, largest, 1).astype(leaf.dtype), direction)
    displacement = jax.tree.map(lambda a, b, u: (b - a) / jnp.asarray(step * largest, u.dtype), start, end, unit)
    squared = optax.tree.vdot(unit, unit)
    return jnp.where(squared > 0, optax.tree.vdot(displacement, unit) / jnp.where(squared > 0, squared, 1), 1)


@register_dataclass
@dataclass(frozen=True)
class SmallSteps:
    """How small is small enough: what the search of `how_small` found, in units of the raw gradients.

    Attributes:
        teacher_step: the largest eps up to which D_S . D_T >= 0 held wherever it was probed, 0 where A = 0.
        student_step: the largest alpha up to which the trait loss stays below its start, at the given eps; 0
            where A = 0.
        teacher_step_searched: the largest eps probed; a teacher step equal to it means "no failure found".
        student_step_searched: the same for alpha. Both are 0 where their direction vanishes.
    """

    teacher_step: PyTree
    student_step: PyTree
    teacher_step_searched: PyTree
    student_step_searched: PyTree


def how_small(
    apply: Callable[[PyTree, PyTree], Float[Array, "*batch n"]],
    params: PyTree,
    trait_loss: Callable[[PyTree], Float[Array, ""]],
    inputs: PyTree,
    channel: Channel,
    *,
    teacher_step: float | Float[Array, ""],
    key: Key[Array, ""] | None = None,
    weights: Float[Array, "*batch"] | None = None,
    farthest: float = 10.0,
    probes: int = 48,
) -> SmallSteps:
    """Search the largest teacher and student steps for which the guarantee still holds.

    `teacher_step` is the eps at which the student's step is judged. Steps are probed on a geometric grid of
    `probes` points that spans eight decades and ends where a step has moved the parameters by `farthest`
    times their norm; the first failure is then bisected to rounding. This is a search, not a bound: a failure
    between two probes that is over by the next is missed, and a gain smaller than its rounding error counts as no
    failure.

    Costs about 2 * probes + 100 forward passes. Pure; wrap it in `jax.jit`.

    Raises:
        InputError: as `check`.
    """
    require_step("teacher_step", teacher_step)
    params, logits_of, trait = _of_trainable(params, apply, inputs, trait_loss)
    before, direction = _descent(trait, params)
    signal = measure_signal(logits_of, params, direction, channel, weights)
    logits, tangent = signal.logits, signal.tangent
    rounding = _rounding(logits)
    # Logits that are off by one unit in their last place change the gradient in the logits by M times that.
    blur = channel.metric(logits, logits * signs(logits))
    unsure = rounding * weighted_mean(jnp.sum(jnp.abs(tangent * blur), axis=-1), signal.weights)

    def targets_of(eps: Float[Array, ""] | float) -> PyTree:
        return channel.targets(key, logits_of(optax.tree.add_scale(params, eps, direction)))

    def inner_product(eps: Float[Array, ""]) -> Float[Array, ""]:
        """D_S . D_T by the chain rule through the logits: no gradient in the parameters is needed."""
        loss = lambda z: imitation_loss(channel, z, targets_of(eps), signal.weights)  # noqa: E731
        return unsure - jax.jvp(loss, (logits,), (tangent,))[1]

    _, gradient = imitation_value_and_grad(channel, logits_of, params, targets_of(teacher_step), signal.weights)
    student_direction = optax.tree.scale(-1, gradient)
    noise = _rounding(params, logits, before) * jnp.abs(before)

    def progress(alpha: Float[Array, ""]) -> Float[Array, ""]:
        """How far the trait loss has fallen."""
        return noise + before - trait(optax.tree.add_scale(params, alpha, student_direction))

    size = farthest * optax.tree.norm(params)
    decades = jnp.logspace(-8, 0, probes, dtype=logits.dtype)
    eps_grid = decades * _ratio(size, optax.tree.norm(direction))
    alpha_grid = decades * _ratio(size, optax.tree.norm(student_direction))
    found = (_first_failure(inner_product, eps_grid), _first_failure(progress, alpha_grid))
    vanishes = (signal.zero_code > 0) | (optax.tree.norm(direction) == 0)
    teacher_found, student_found = (jnp.where(vanishes, 0, step) for step in found)
    return SmallSteps(teacher_found, student_found, eps_grid[-1], alpha_grid[-1])


def _first_failure(
    gain: Callable[[Float[Array, ""]], Float[Array, ""]], grid: Float[Array, " probes"]
) -> Float[Array, ""]:
    """Where a function first falls below 0 on a grid, bisected; the end of the grid if it never does."""
    # Not a number is a failure too.
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
