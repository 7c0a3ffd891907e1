"""Lemma 1 and Theorem 1 of doi 10.1038/s41586-026-10319-8, on any differentiable function.

The teacher takes one step: theta_T = theta_0 + eps D_T. The student starts at the same theta_0. It takes one
gradient step of size alpha on the imitation loss; D_S is minus the gradient. Let J be the Jacobian of the logits
at theta_0, and M the metric of the channel. Lemma 1 says that for any direction D_T

    D_S . D_T = eps A + O(eps^2),   A = mean over positions of (J D_T)^T M (J D_T) >= 0.

Theorem 1 says that for D_T = -grad L_T(theta_0), where L_T is a trait loss,

    L_T(theta_0 + alpha D_S) - L_T(theta_0) = -eps alpha A + O(eps^2 alpha + eps^2 alpha^2).

The code uses only gradients and Jacobian-vector products. It never builds J or M.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.channel import Channel, imitation_value_and_grad
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model, require_arrays, split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.signal import ZERO_CASES, measure_signal
from subliminal_theory.theorem.setting import (
    Apply,
    Scalar,
    TraitLoss,
    kept,
    of_trainable,
    ratio,
    require_step,
    rounding,
    teacher_direction,
)

_OF_THE_STEPS = ("inner_product", "predicted_inner_product", "cosine", "teacher_norm", "student_norm")
_OF_THE_TRAIT = ("trait_loss_before", "trait_loss_after", "predicted_change")
_OF_ANOTHER_START = ("unupdated_cosine", "unupdated_inner_product")


@register_dataclass
@dataclass(frozen=True)
class Report:
    """The measurements of `check`. Every number is a scalar array, so jit and vmap can return a report.

    If `check` was given a direction and no trait loss, all fields about the trait loss are nan.

    Attributes:
        inner_product: D_S . D_T as measured.
        predicted_inner_product: eps A.
        inner_product_rounding: 16 times the rounding error of D_S . D_T, from the logits and from the sum. The
            sign of a smaller product means nothing.
        cosine: the cosine of D_S and D_T (0 if either is 0).
        teacher_norm: |D_T|.
        student_norm: |D_S|.
        trait_loss_before: L_T at the student's initialization.
        trait_loss_after: L_T after the student's step.
        predicted_change: -eps alpha A, the leading order of after - before.
        change_rounding: 16 u |L_T|, where u is the machine epsilon of the coarsest dtype in use. The sign of a
            smaller change means nothing.
        teacher_kept: the share of the teacher's step that remains in the dtype of its parameters: near 1, or 0 if
            theta + eps D_T rounds to theta.
        student_kept: the same for the student's step.
        zero_code: the index into `ZERO_CASES` of the reason why A is 0; 0 if A is not 0.
        unupdated_cosine: the cosine of D_S and the direction that imitates the teacher before its step. It tends
            to 1 as eps tends to 0. nan for a shared initialization, where that direction is 0.
        unupdated_inner_product: that direction times D_T. For a different initialization this, not eps A, is the
            leading order of D_S . D_T. nan for a shared initialization.
        same_initialisation: whether student and teacher start at the same parameters, as the theorem requires.
        exact: whether the channel is exact. If not, the theorem holds only on average over the targets.
        has_trait: True if the teacher follows a trait loss (Theorem 1), False if a direction was given (Lemma 1).
    """

    inner_product: PyTree
    predicted_inner_product: PyTree
    inner_product_rounding: PyTree
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
    has_trait: bool = field(default=True, metadata={"static": True})

    @property
    def change(self) -> PyTree:
        """L_T after the student's step minus before."""
        return self.trait_loss_after - self.trait_loss_before

    @property
    def zero_case(self) -> str:
        """Why A is 0, or the empty string."""
        return ZERO_CASES[int(self.zero_code)]

    @property
    def verdict(self) -> str:
        """What the measurements show, or why they show nothing and what to do.

        `orthogonal` if A = 0. Otherwise `descends` if the trait loss falls, `aligned` if a direction was given and
        D_S . D_T > 0, and `step too large` if neither.
        """
        if broken := [name for name in self._numbers if not math.isfinite(float(getattr(self, name)))]:
            return f"not finite: {', '.join(broken)}; use smaller steps"
        if not self.same_initialisation:
            return "different initialization"
        if self.zero_case:
            return "orthogonal"
        for name in ("teacher", "student") if self.has_trait else ("teacher",):
            if float(getattr(self, f"{name}_kept")) < 0.5:
                return f"step lost to rounding: the {name}'s; use float64 or a larger step"
        effect, noise = (
            (-self.change, self.change_rounding)
            if self.has_trait
            else (self.inner_product, self.inner_product_rounding)
        )
        if abs(float(effect)) <= float(noise):
            return "below rounding: use float64 or larger steps"
        if not self.exact:
            return "single draw: one draw of targets decides nothing; average over keys"
        if float(effect) < 0:
            return "step too large"
        return "descends" if self.has_trait else "aligned"

    @property
    def _numbers(self) -> list[str]:
        trait = _OF_THE_TRAIT if self.has_trait else ()
        return [*_OF_THE_STEPS, *trait, *(() if self.same_initialisation else _OF_ANOTHER_START)]

    def __str__(self) -> str:
        lines = [
            f"verdict                  {self.verdict}" + (f" ({self.zero_case})" if self.zero_case else ""),
            f"D_S . D_T                {float(self.inner_product):+.6e}",
            f"  predicted, eps A       {float(self.predicted_inner_product):+.6e}",
            f"cosine                   {float(self.cosine):+.6f}",
        ]
        lines += [
            f"trait loss before        {float(self.trait_loss_before):.9g}",
            f"change                   {float(self.change):+.6e}",
            f"  predicted, -eps alpha A {float(self.predicted_change):+.6e}",
        ] * self.has_trait
        if not self.same_initialisation:
            lines.append(f"cosine with imitating the un-updated teacher {float(self.unupdated_cosine):+.6f}")
        return "\n".join(lines)


def check(
    apply: Apply,
    params: PyTree,
    trait_loss: TraitLoss | None,
    inputs: PyTree,
    channel: Channel,
    *,
    teacher_step: Scalar,
    student_step: Scalar | None = None,
    direction: PyTree = None,
    key: Key[Array, ""] | None = None,
    weights: Float[Array, "*batch"] | None = None,
    student_params: PyTree | None = None,
) -> Report:
    """Take the two steps of the theorem with any function, and compare them with the prediction.

    `apply(params, inputs)` gives logits [*batch, n]. `trait_loss(params)` is any differentiable scalar, such as a
    cross-entropy with weight decay, or a preference between answers. `teacher_step` is eps and `student_step` is
    alpha, in units of the raw gradients. `weights` [*batch] weight the mean over positions, 1 by default.

    For any other update of the teacher, such as a displacement by Adam, give it as `direction`, a pytree like
    `params`. `trait_loss` is then None and `student_step` is left out, and the report says nothing about a trait.
    With `student_params` the student has another initialization than the teacher. The theorem does not cover this
    case; the report then compares D_S with the direction that imitates the teacher before its step.

    Parameters without a gradient (integers, booleans, random keys) stay as they are. The cost is two gradients and
    two Jacobian-vector products, one more gradient with `student_params`, and memory for a few copies of the
    parameters. Pure: wrap it in `jax.jit` for large models. Exact up to rounding. Use float64 to see orders in
    eps.

    Raises:
        InputError: a step is not positive and finite; both or neither of a trait loss and a direction are given; a
            student's step is given without a trait loss, or the reverse; the trait loss is not a scalar; the
            channel selects logits that do not exist, has no output metric, or contradicts its loss with its metric
            or its visible logits (not checked for traced values); parameters are not arrays; the parameter trees
            differ.
    """
    if isinstance(apply, Model | nnx.Module):
        raise InputError(
            f"check wants a function, got {type(apply).__name__}: give model.apply and model.params, where model "
            "is a Model or from_nnx(module)"
        )
    require_arrays(params)
    require_step("teacher_step", teacher_step)
    has_trait = trait_loss is not None
    if has_trait == (student_step is None):
        raise InputError("student_step goes with a trait loss: give it where there is one, and leave it out else")
    if student_step is not None:
        require_step("student_step", student_step)
    same = student_params is None
    student_params = params if same else student_params
    if jax.tree.map(jnp.shape, student_params) != jax.tree.map(jnp.shape, params):
        raise InputError("student_params must have the structure and shapes of params")
    logits_of, student_logits = (of_trainable(p, lambda p: apply(p, inputs)) for p in (params, student_params))
    trait, student_trait = (trait_loss and of_trainable(p, trait_loss) for p in (params, student_params))
    (params, _), (student, _) = split_trainable(params), split_trainable(student_params)
    loss_before, direction = teacher_direction(trait, direction, params)
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
        unupdated_cosine = ratio(overlap, student_norm * optax.tree.norm(unupdated))

    nothing = jnp.full_like(inner, jnp.nan)
    before, after, lost, student_kept = nothing, nothing, nothing, nothing
    if student_trait is not None and student_step is not None:
        moved = optax.tree.add_scale(student, student_step, student_direction)
        before, after = loss_before if same else student_trait(student), student_trait(moved)
        lost = rounding(params, signal.logits, before) * jnp.maximum(jnp.abs(before), jnp.abs(after))
        student_kept = kept(student, moved, student_step, student_direction)
    return Report(
        inner_product=inner,
        predicted_inner_product=teacher_step * signal.strength,
        inner_product_rounding=signal.rounding(channel)
        + rounding(params) * _sum_of_sizes(student_direction, direction),
        cosine=ratio(inner, student_norm * teacher_norm),
        teacher_norm=teacher_norm,
        student_norm=student_norm,
        trait_loss_before=before,
        trait_loss_after=after,
        predicted_change=nothing if student_step is None else -teacher_step * student_step * signal.strength,
        change_rounding=lost,
        teacher_kept=kept(params, teacher, teacher_step, direction),
        student_kept=student_kept,
        zero_code=jnp.where(teacher_norm == 0, 1 if has_trait else 6, signal.zero_code),
        unupdated_cosine=unupdated_cosine,
        unupdated_inner_product=unupdated_inner,
        same_initialisation=same,
        exact=channel.exact,
        has_trait=has_trait,
    )


def _sum_of_sizes(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The sum of |a_i b_i|: the rounding error of a . b is relative to it."""
    return optax.tree.vdot(jax.tree.map(jnp.abs, a), jax.tree.map(jnp.abs, b))
