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
from jaxtyping import Array, Float, Int, Key, PyTree

from subliminal_theory.channel import Channel, imitation_loss, weighted_mean
from subliminal_theory.errors import InputError

ZERO_CASES = (
    "",
    "the trait loss is stationary: the teacher does not move",
    "blind channel: a softmax over one logit, or no logit of positive weight",
    "invisible trait: the teacher's step moves no logit that the channel sees",
    "logit shift: the step moves all visible logits alike, which a softmax cannot see",
    "no signal above rounding",
)


@jax.tree_util.register_dataclass
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
        zero_code: which of `ZERO_CASES` makes A vanish, 0 for none.
        unupdated_cosine: cosine of D_S and the direction that imitates the teacher before its step; nan
            for a shared initialisation, where that direction is 0. It tends to 1 with eps otherwise.
        unupdated_inner_product: that direction times D_T, the leading order of D_S . D_T for a
            different initialisation, where eps A is not.
        same_initialisation: whether the theorem covers the case.
    """

    inner_product: Float[Array, ""]
    predicted_inner_product: Float[Array, ""]
    cosine: Float[Array, ""]
    teacher_norm: Float[Array, ""]
    student_norm: Float[Array, ""]
    trait_loss_before: Float[Array, ""]
    trait_loss_after: Float[Array, ""]
    predicted_change: Float[Array, ""]
    zero_code: Int[Array, ""]
    unupdated_cosine: Float[Array, ""]
    unupdated_inner_product: Float[Array, ""]
    same_initialisation: bool = field(metadata={"static": True})

    @property
    def change(self) -> Float[Array, ""]:
        """L_T after the student's step minus before."""
        return self.trait_loss_after - self.trait_loss_before

    @property
    def zero_case(self) -> str:
        """Why A vanishes, or the empty string."""
        return ZERO_CASES[int(self.zero_code)]

    @property
    def verdict(self) -> str:
        """`descends`, `orthogonal`, `step too large`, or `different initialisation`."""
        if not self.same_initialisation:
            return "different initialisation"
        if self.zero_case:
            return "orthogonal"
        return "descends" if float(self.change) < 0 else "step too large"

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

    Costs two gradients and one Jacobian-vector product (three gradients and one with `student_params`)
    and keeps a few copies of the parameters. Pure: wrap it in `jax.jit` for large models. Exact up to
    rounding; run it in float64 to see orders in eps.

    Raises:
        InputError: a step that is not positive and finite, a trait loss that is no scalar, a channel
            whose logits do not exist or that has no output metric, or unlike parameter trees.
    """
    for name, step in (("teacher_step", teacher_step), ("student_step", student_step)):
        require_step(name, step)
    same = student_params is None
    student = params if same else student_params
    if jax.tree.map(jnp.shape, student) != jax.tree.map(jnp.shape, params):
        raise InputError("student_params must have the structure and shapes of params")

    loss_before, direction = _descent(trait_loss, params)
    logits, tangent = jax.jvp(lambda p: apply(p, inputs), (params,), (direction,))
    visible = channel.visible(logits.shape[-1])
    weights = jnp.ones(logits.shape[:-1], logits.dtype) if weights is None else weights
    seen = channel.metric(logits, tangent)
    signal = weighted_mean(jnp.sum(tangent * seen, axis=-1), weights)

    def imitation(p: PyTree, targets: Array) -> Float[Array, ""]:
        return imitation_loss(channel, apply(p, inputs), targets, weights)

    teacher = optax.tree.add_scale(params, teacher_step, direction)
    targets = channel.targets(key, apply(teacher, inputs))
    _, student_direction = _descent(lambda p: imitation(p, targets), student)
    inner = optax.tree.vdot(student_direction, direction)
    teacher_norm, student_norm = optax.tree.norm(direction), optax.tree.norm(student_direction)

    unupdated_cosine = unupdated_inner = jnp.full_like(inner, jnp.nan)
    if not same:
        _, unupdated = _descent(lambda p: imitation(p, channel.targets(key, logits)), student)
        unupdated_inner = optax.tree.vdot(unupdated, direction)
        overlap = optax.tree.vdot(student_direction, unupdated)
        unupdated_cosine = _ratio(overlap, student_norm * optax.tree.norm(unupdated))

    after = trait_loss(optax.tree.add_scale(student, student_step, student_direction))
    return Report(
        inner_product=inner,
        predicted_inner_product=teacher_step * signal,
        cosine=_ratio(inner, student_norm * teacher_norm),
        teacher_norm=teacher_norm,
        student_norm=student_norm,
        trait_loss_before=loss_before if same else trait_loss(student),
        trait_loss_after=after,
        predicted_change=-teacher_step * student_step * signal,
        zero_code=_zero_code(channel, logits, tangent, seen, visible, weights, teacher_norm),
        unupdated_cosine=unupdated_cosine,
        unupdated_inner_product=unupdated_inner,
        same_initialisation=same,
    )


def require_step(name: str, step: float | Float[Array, ""]) -> None:
    """Refuse a step size that is not positive and finite.

    Raises:
        InputError: names the step and its value.
    """
    if not isinstance(step, jax.core.Tracer) and not 0 < float(step) < math.inf:
        raise InputError(f"{name} must be a positive, finite number, got {float(step)}")


def _descent(loss: Callable[[PyTree], Float[Array, ""]], params: PyTree) -> tuple[Float[Array, ""], PyTree]:
    """The loss and minus its gradient."""
    shape = jax.eval_shape(loss, params).shape
    if shape != ():
        raise InputError(f"the trait loss must be a scalar, got shape {shape}")
    value, gradient = jax.value_and_grad(loss)(params)
    return value, optax.tree.scale(-1, gradient)


def _ratio(a: Float[Array, ""], b: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _zero_code(
    channel: Channel,
    logits: Float[Array, "*batch n"],
    tangent: Float[Array, "*batch n"],
    seen: Float[Array, "*batch n"],
    visible: Array,
    weights: Float[Array, "*batch"],
    teacher_norm: Float[Array, ""],
) -> Int[Array, ""]:
    """Index into `ZERO_CASES`. A is called zero below the rounding error of tangent . M tangent."""
    n = logits.shape[-1]
    rounding = 16 * jnp.finfo(logits.dtype).eps

    def strength(vector: Array, image: Array) -> Float[Array, ""]:
        return weighted_mean(jnp.sum(jnp.abs(vector * image), axis=-1), weights)

    # M is blind if it annihilates a generic direction: one that is neither constant nor sparse.
    probe = jnp.broadcast_to(jnp.sin(1.0 + jnp.arange(n, dtype=logits.dtype)), logits.shape)
    size = jnp.max(jnp.abs(channel.metric(logits, probe)))
    blind = size <= rounding
    moved = jnp.where(visible, tangent, 0)
    invisible = jnp.max(jnp.abs(moved)) == 0
    spread = jnp.max(moved, axis=-1, where=visible, initial=-jnp.inf) - jnp.min(
        moved, axis=-1, where=visible, initial=jnp.inf
    )
    shift = jnp.all((spread <= rounding * jnp.max(jnp.abs(moved), axis=-1)) | (weights == 0))
    zero = strength(tangent, seen) <= rounding * size * strength(moved, moved)
    named = jnp.where(shift & zero, 4, jnp.where(zero, 5, 0))
    return jnp.where(teacher_norm == 0, 1, jnp.where(blind, 2, jnp.where(invisible, 3, named)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmallSteps:
    """How small is small enough: the answer of `how_small`, in units of the raw gradients.

    Attributes:
        teacher_step: the largest eps up to which D_S . D_T >= 0 held wherever it was probed.
        teacher_step_bound: 2 A / k, k the largest -d^2(D_S . D_T)/d eps^2 up to there: below it
            D_S . D_T > 0 follows from Taylor's theorem.
        student_step: the largest alpha up to which the trait loss stays below its start, at the given eps.
        student_step_bound: 2 D_S . D_T / k, k the largest D_S^T H D_S up to there, H the Hessian of the
            trait loss.
        teacher_step_searched: the largest eps probed; a teacher step equal to it means "no failure found".
        student_step_searched: the same for alpha. Both are 0 where their direction vanishes.
    """

    teacher_step: Float[Array, ""]
    teacher_step_bound: Float[Array, ""]
    student_step: Float[Array, ""]
    student_step_bound: Float[Array, ""]
    teacher_step_searched: Float[Array, ""]
    student_step_searched: Float[Array, ""]


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
    """The largest teacher and student steps for which the guarantee still holds.

    `teacher_step` is the eps at which the student's step is judged. Steps are probed on a geometric grid of
    `probes` points that spans eight decades and ends where a step has moved the parameters by `farthest`
    times their norm; the first failure is then bisected to rounding. The bounds use curvature along the two
    directions only (nested Jacobian-vector products, so Hessian-vector products without the Hessian), taken
    at the probes: exact where curvature does not peak between probes, and blind to the kinks of a ReLU,
    whose curvature is 0 almost everywhere. Channels with sampled targets have no derivative in eps.

    Costs about 2 * probes + 100 forward passes and 2 * probes second derivatives. Pure; wrap it in `jax.jit`.

    Raises:
        InputError: as `check`.
    """
    require_step("teacher_step", teacher_step)
    _, direction = _descent(trait_loss, params)
    logits, tangent = jax.jvp(lambda p: apply(p, inputs), (params,), (direction,))
    channel.visible(logits.shape[-1])
    weights = jnp.ones(logits.shape[:-1], logits.dtype) if weights is None else weights

    def inner_product(eps: Float[Array, ""]) -> Float[Array, ""]:
        """D_S . D_T by the chain rule through the logits: no gradient in the parameters is needed."""
        targets = channel.targets(key, apply(optax.tree.add_scale(params, eps, direction), inputs))
        loss = lambda z: imitation_loss(channel, z, targets, weights)  # noqa: E731
        return -jax.jvp(loss, (logits,), (tangent,))[1]

    targets = channel.targets(key, apply(optax.tree.add_scale(params, teacher_step, direction), inputs))
    _, student_direction = _descent(lambda p: imitation_loss(channel, apply(p, inputs), targets, weights), params)

    def progress(alpha: Float[Array, ""]) -> Float[Array, ""]:
        """How far the trait loss has fallen."""
        return trait_loss(params) - trait_loss(optax.tree.add_scale(params, alpha, student_direction))

    size = farthest * optax.tree.norm(params)
    decades = jnp.logspace(-8, 0, probes, dtype=logits.dtype)
    eps_grid = decades * _ratio(size, optax.tree.norm(direction))
    alpha_grid = decades * _ratio(size, optax.tree.norm(student_direction))
    teacher_found, teacher_bound = _first_failure(inner_product, eps_grid)
    student_found, student_bound = _first_failure(progress, alpha_grid)
    return SmallSteps(teacher_found, teacher_bound, student_found, student_bound, eps_grid[-1], alpha_grid[-1])


def _first_failure(
    gain: Callable[[Float[Array, ""]], Float[Array, ""]], grid: Float[Array, " probes"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Where a function with gain(0) = 0 and gain'(0) > 0 first falls below 0, found and bounded."""

    def slope(x: Float[Array, ""]) -> Float[Array, ""]:
        return jax.jvp(gain, (x,), (jnp.ones_like(x),))[1]

    def curvature(x: Float[Array, ""]) -> Float[Array, ""]:
        return -jax.jvp(slope, (x,), (jnp.ones_like(x),))[1]

    start = jnp.zeros_like(grid[0])
    failed = jax.lax.map(gain, grid) < 0
    first = jnp.argmax(failed)
    low = jnp.where(first == 0, 0, grid[first - 1])

    def halve(bracket: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bracket
        middle = (low + high) / 2
        good = gain(middle) >= 0
        return (jnp.where(good, middle, low), jnp.where(good, high, middle)), None

    (low, _), _ = jax.lax.scan(halve, (low, grid[first]), None, length=50)
    found = jnp.where(jnp.any(failed), low, grid[-1])

    bend = jax.lax.cummax(jnp.maximum(jax.lax.map(curvature, jnp.append(start, grid)), 0))[1:]
    reach = jnp.where(bend > 0, 2 * slope(start) / jnp.where(bend > 0, bend, 1), jnp.inf)
    return found, jnp.max(jnp.minimum(grid, reach))
