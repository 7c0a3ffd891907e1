"""Bounds on D_S . D_T for a teacher's step of any size.

f_0 are the student's logits, f_T the teacher's. By the chain rule through the logits, D_S . D_T is the mean of
<p(f_T), J D_T>. Here p(y) = -grad_z L(f_0; y) is the pull of the loss on the student's logits. Write
f_T - f_0 = eps J D_T + r; the curvature of the network is in r. For squared error and for divergences of two
softmaxes, the pull is p(f_T) = H (f_T - f_0) with H >= 0. At each position, H lies between `low` M and `high` M,
where M is the metric at f_0. For squared error and reverse KL, `low` = `high` = 1. So

    D_S . D_T = mean of <H (eps J D_T + r), J D_T>  >=  eps |J D_T|_H^2 - |r|_H |J D_T|_H,

by the Cauchy-Schwarz inequality over positions and logits together. If f is affine in the parameters that the
teacher moves, r = 0, and D_S . D_T >= 0 at every eps. Otherwise the bound certifies D_S . D_T >= 0 while
|r|_H <= eps |J D_T|_H.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from subliminal_theory.channel import (
    Channel,
    SquaredError,
    Subset,
    TopK,
    WeightedSum,
    imitation_loss,
    weighted_mean,
)
from subliminal_theory.divergence import JensenShannon, ReverseKL, SoftLogits
from subliminal_theory.errors import InputError
from subliminal_theory.model import split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.signal import measure_signal
from subliminal_theory.theorem.setting import (
    Apply,
    Scalar,
    TraitLoss,
    of_trainable,
    ratio,
    require_step,
    teacher_direction,
)

Bounds = tuple[Float[Array, "*batch"], Float[Array, "*batch"]]


@register_dataclass
@dataclass(frozen=True)
class Certificate:
    """The result of `certificate` for one teacher's step: scalar arrays.

    Attributes:
        inner_product: D_S . D_T at this step, exact.
        lower, upper: bounds on `inner_product` that use only the size of r. The inequalities are exact.
        leading: eps A, the leading order of `inner_product`.
        curvature: |r|_M / |eps J D_T|_M. For squared error and reverse KL, it bounds |D_S . D_T / (eps A) - 1|.
        condition: a factor that extends the result to other losses. Take a squared error on the visible logits
            whose weights over positions and logits are `weights` times other numbers. If these numbers differ
            from each other by at most this factor, D_S . D_T >= 0 for that loss too. 0 if it holds for no such
            loss.
    """

    inner_product: PyTree
    lower: PyTree
    upper: PyTree
    leading: PyTree
    curvature: PyTree
    condition: PyTree

    @property
    def certified(self) -> PyTree:
        """Whether the bound shows that D_S . D_T >= 0 at this step."""
        return self.lower >= 0


def certificate(
    apply: Apply,
    params: PyTree,
    trait_loss: TraitLoss | None,
    inputs: PyTree,
    channel: Channel,
    *,
    teacher_step: Scalar,
    direction: PyTree = None,
    weights: Float[Array, "*batch"] | None = None,
) -> Certificate:
    """Bounds on D_S . D_T for a teacher's step of any size, and whether they prove D_S . D_T >= 0.

    The arguments are as in `check`. The result is for the given step only, not for smaller steps. D_S . D_T
    itself is exact and needs no bound. The bounds add three things: the reason for its sign (r is small), its
    largest distance from its leading order, and a statement about other losses (`condition`). They drop the sign
    of <r, J D_T>, so D_S . D_T >= 0 may also hold for a step that is not certified. The cost is one gradient (none
    with `direction`), two Jacobian-vector products and one forward pass. Exact up to rounding. Pure.

    Raises:
        InputError: as `check`; the channel is not squared error, a divergence, or a `Subset`, `TopK` or
            `WeightedSum` of those.
    """
    require_step("teacher_step", teacher_step)
    trait = trait_loss and of_trainable(params, trait_loss)
    logits_of = of_trainable(params, lambda p: apply(p, inputs))
    params, _ = split_trainable(params)
    _, direction = teacher_direction(trait, direction, params)
    signal = measure_signal(logits_of, params, direction, channel, weights)
    start, moved, share = signal.logits, signal.tangent, signal.weights
    end = logits_of(optax.tree.add_scale(params, teacher_step, direction))
    rest = end - start - teacher_step * moved
    low, high = bounds(channel, start, end, jnp.broadcast_to(channel.visible(start.shape[-1]), start.shape))

    def squared(tangent: Array, factor: Array | float) -> Array:
        return weighted_mean(factor * jnp.sum(tangent * channel.metric(start, tangent), axis=-1), share)

    targets = channel.targets(None, end)
    loss = lambda z: imitation_loss(channel, z, targets, share)  # noqa: E731
    inner = -jax.jvp(loss, (start,), (moved,))[1]
    least, most = (jnp.sqrt(jnp.maximum(squared(moved, factor), 0)) for factor in (low, high))
    error = jnp.sqrt(jnp.maximum(squared(rest, high), 0))
    # The least eps U^2 - |r| U over all possible U = |J D_T|_H.
    worst = jnp.clip(error / (2 * teacher_step), least, most)
    sizes = [jnp.sqrt(jnp.maximum(squared(tangent, 1.0), 0)) for tangent in (rest, teacher_step * moved)]
    return Certificate(
        inner_product=inner,
        lower=_finite(worst * (teacher_step * worst - error), -jnp.inf),
        upper=_finite(most * (teacher_step * most + error), jnp.inf),
        leading=teacher_step * signal.strength,
        curvature=ratio(*sizes),
        condition=_condition(channel, end - start, moved, share),
    )


def _finite(value: Array, otherwise: float) -> Array:
    return jnp.where(jnp.isfinite(value), value, otherwise)


def _condition(channel: Channel, change: Array, tangent: Array, weights: Array) -> Array:
    """(1 + c) / (1 - c), or 0 if c < 0.

    c is the cosine of f_T - f_0 and J D_T on the visible logits, over all positions. A matrix whose eigenvalues
    lie between m and k m turns no vector by more than arcsin((k - 1) / (k + 1)).
    """
    seen = channel.visible(change.shape[-1])
    change, tangent = (jnp.where(seen, leaf, 0) for leaf in (change, tangent))
    inner, one, two = (
        weighted_mean(jnp.sum(a * b, axis=-1), weights)
        for a, b in ((change, tangent), (change, change), (tangent, tangent))
    )
    cosine = jnp.minimum(ratio(inner, jnp.sqrt(one * two)), 1)
    factor = (1 + cosine) / jnp.where(cosine < 1, 1 - cosine, jnp.finfo(cosine.dtype).eps)
    return jnp.where(cosine >= 0, factor, 0)


@functools.singledispatch
def bounds(channel: Any, start: Array, end: Array, seen: Bool[Array, "*batch n"]) -> Bounds:
    """The factors `low` and `high` of each position: low M <= H <= high M.

    Raises:
        InputError: no such factors are known for this channel.
    """
    raise InputError(
        f"no certificate is known for {type(channel).__name__}: use squared error, a divergence of two softmaxes, "
        "or a Subset, TopK or WeightedSum of those"
    )


@bounds.register(SquaredError)
@bounds.register(ReverseKL)
def _(channel: Any, start: Array, end: Array, seen: Array) -> Bounds:
    # For reverse KL, the pull is (diag(s) - s s^T) (f_T - f_0) / T^2, where s is the softmax at f_0.
    one = jnp.ones(start.shape[:-1], start.dtype)
    return one, one


@bounds.register
def _(channel: SoftLogits, start: Array, end: Array, seen: Array) -> Bounds:
    # H is the mean of M along the segment from f_0 to f_T. At each point of it, no probability has changed by more
    # than a factor of exp(the range of the change up to there).
    change = (end - start) / channel.temperature
    span = _largest(change, seen) + _largest(-change, seen)
    safe = jnp.where(span > 0, span, 1)
    return jnp.where(span > 0, -jnp.expm1(-span) / safe, 1), jnp.where(span > 0, jnp.expm1(span) / safe, 1)


@bounds.register
def _(channel: JensenShannon, start: Array, end: Array, seen: Array) -> Bounds:
    # The pull is s (log(1 + q/s) - its mean) / (2 T). The derivative of log(1 + e^t) is the logistic function.
    log_q, log_s = (jax.nn.log_softmax(leaf / channel.temperature, where=seen) for leaf in (end, start))
    odds = log_q - log_s
    return 2 * jax.nn.sigmoid(-_largest(-odds, seen)), 2 * jax.nn.sigmoid(_largest(odds, seen))


@bounds.register
def _(channel: Subset, start: Array, end: Array, seen: Array) -> Bounds:
    return bounds(channel.of, start, end, seen & jnp.broadcast_to(channel.visible(start.shape[-1]), seen.shape))


@bounds.register
def _(channel: TopK, start: Array, end: Array, seen: Array) -> Bounds:
    before, after = (channel.largest(jnp.where(seen, leaf, -jnp.inf)) for leaf in (start, end))
    low, high = bounds(channel.of, start, end, seen & before)
    same = jnp.all(before == after, axis=-1)
    return jnp.where(same, low, 0), jnp.where(same, high, jnp.inf)


@bounds.register
def _(channel: WeightedSum, start: Array, end: Array, seen: Array) -> Bounds:
    each = [bounds(part, start, end, seen) for part in channel.channels]
    low, high = (jnp.stack(leaves) for leaves in zip(*each, strict=True))
    return jnp.min(low, axis=0), jnp.max(high, axis=0)


def _largest(values: Array, seen: Array) -> Array:
    return jnp.max(values, axis=-1, where=seen, initial=-jnp.inf)
