"""Many steps of the student: a condition under which the trait loss does not rise.

The teacher is theta_0 + eps D_T, where D_T = -g and g = grad L_T(theta_0). The student starts at theta_0. It takes
n steps theta <- theta - a_t grad l_t(theta) on imitation losses l_t. Rates, batches and exact channels may change
from step to step. Each l_t is stationary where student and teacher are equal. So to leading order in eps, its
gradient is G_t (theta - theta_0 - eps D_T), where G_t is the mean of J^T M J over the batch, at theta_0. Hence

    theta_n - theta_0 = eps s_n + O(eps^2),    s_0 = 0,  s_{t+1} = s_t + a_t G_t (D_T - s_t),
    L_T(theta_n) - L_T(theta_0) = -eps g^T (I - (I - a_n G_n) ... (I - a_1 G_1)) g + O(eps^2).

If 0 <= a_t lambda_max(G_t) <= 2 for all t, no factor lengthens a vector, so the leading term is not positive.
Below 2, it is 0 only if G_t g = 0 in every step with a_t > 0. The limit is tight: above 2, the trait loss can
rise. Teacher and student may share one symmetric preconditioner P >= 0 (D_T = -P g, steps a_t P grad l_t). Then
the same holds for P^1/2 G_t P^1/2, with lengths in the metric of P^-1. Two cases are not covered: momentum, and
sampled targets, which move the student by more than eps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.audit import refuse_wrong_channel
from subliminal_theory.channel import Channel
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Batch, Buckets, Source, batch_shapes, with_batch
from subliminal_theory.theorem.krylov import Product, lanczos, ritz
from subliminal_theory.theorem.setting import (
    Apply,
    Scalar,
    TraitLoss,
    descent,
    of_trainable,
    require_step,
    teacher_direction,
)

DOUBT = 1e-3
Rates = Float[Array, " steps"] | Float[np.ndarray, " steps"]


@register_dataclass
@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of G, or of P^1/2 G P^1/2, between two bounds.

    Attributes:
        value: the largest Ritz value. Up to rounding, the eigenvalue is at least this.
        above: an upper bound on the eigenvalue. It fails with probability at most 0.001 over random starts. For n
            parameters and k products it is value / (1 - e), where
            e = (log(1.648 sqrt(n) / 0.001) / (2 k - 1))^2 (Kuczynski and Wozniakowski, doi 10.1137/0613066,
            Theorem 4.2). It is inf after too few products, and `value` once the Krylov space is exhausted.
        residual: an eigenvalue of the matrix lies within this distance of `value`.
    """

    value: PyTree
    above: PyTree
    residual: PyTree


@register_dataclass
@dataclass(frozen=True)
class Contraction:
    """The result of `contraction` for n steps of a student.

    Attributes:
        predicted_change: the leading order in eps of the change of the trait loss,
            -eps g^T (I - product of (I - a_t P G_t)) P g.
        rates: a_t [steps].
        sharpness: the `Sharpness` of each step's G_t; its leaves are [steps].
    """

    predicted_change: PyTree
    rates: PyTree
    sharpness: Sharpness

    @property
    def verdict(self) -> str:
        """`holds` if a_t lambda_max(G_t) <= 2 for all t. Otherwise the step that exceeds 2 or is undecided."""
        rates, below, above = (np.asarray(x) for x in (self.rates, self.sharpness.value, self.sharpness.above))
        allowed = 2 + 128 * float(np.finfo(below.dtype).eps)
        at_most = np.where(rates > 0, rates * above, 0)
        for sure, name, low, high in (
            (rates * below > allowed, "exceeds 2", rates * below, at_most),
            (~(at_most <= allowed), "undecided", rates * below, at_most),
        ):
            if sure.any():
                t = int(sure.argmax())
                return f"{name} at step {t + 1}: rate times sharpness is from {low[t]:.4g} to {high[t]:.4g}"
        return "holds"


def gauss_newton(
    apply: Apply, params: PyTree, inputs: PyTree, channel: Channel, weights: Float[Array, "*batch"] | None = None
) -> Product:
    """The function v -> G v, for pytrees v like the trainable part of `params`.

    G is the mean over positions of J^T M J. In exact arithmetic it is the Hessian of the imitation loss where
    student and teacher are equal. `weights` [*batch] are the weights of the mean, 1 by default. The call costs one
    forward pass. Each product then costs one linear forward and one linear backward pass. J and G are never built.
    """
    logits_of = of_trainable(params, lambda p: apply(p, inputs))
    logits, forward = jax.linearize(logits_of, split_trainable(params)[0])
    backward = jax.linear_transpose(forward, split_trainable(params)[0])
    weights = jnp.ones(logits.shape[:-1], logits.dtype) if weights is None else weights
    total = jnp.sum(weights)
    share = (weights / jnp.where(total > 0, total, 1)).astype(logits.dtype)[..., None]

    def product(v: PyTree) -> PyTree:
        (image,) = backward(share * channel.metric(logits, forward(v)))
        return image

    return product


def sharpness(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    channel: Channel,
    *,
    weights: Float[Array, "*batch"] | None = None,
    preconditioner: PyTree = None,
    key: Key[Array, ""] | None = None,
    products: int = 30,
) -> Sharpness:
    """The largest eigenvalue of the Gauss-Newton matrix of an imitation loss, by Lanczos from a random start.

    The condition of `contraction` holds up to a rate of 2 over this eigenvalue. The arguments are as in
    `check`. `preconditioner` is the diagonal of P: a pytree like `params` of numbers >= 0. The cost is `products`
    products with G, and memory for a few copies of the parameters. Pure.

    Raises:
        InputError: the channel is not exact or its loss is not imitation; the preconditioner does not match the
            parameters, or is negative or not finite; `products` is below 2.
    """
    _require(apply, params, inputs, channel, products)
    scales = _scales(preconditioner, params)
    product = gauss_newton(apply, params, inputs, channel, weights)
    key = jax.random.key(0) if key is None else key
    return _sharpness(product, split_trainable(params)[0], scales, key, products)


def displacement(
    apply: Apply,
    params: PyTree,
    direction: PyTree,
    source: Source | Buckets,
    channel: Channel,
    *,
    rates: Rates,
    key: Key[Array, ""],
    start: PyTree = None,
    preconditioner: PyTree = None,
) -> PyTree:
    """The displacement s_n of a student: after n steps it is at theta_0 + eps s_n, to leading order in eps.

    `direction` is D_T, a pytree like the trainable `params`. `rates` [steps] are a_t. The batches are the same as
    in `distill(..., source, channel, optax.sgd(rates), steps, key=key)`. If the channel or the source changes
    during a run, make one call for each, and give each call the previous result as `start`. Under the condition of
    `contraction`, D_T . s_n >= 0 for any D_T, in the metric of P^-1. The cost is one product with G per step.
    Pure.

    Raises:
        InputError: `rates` is not a vector, or has entries that are negative or not finite; the source has labels
            or targets; as `sharpness`.
    """
    scales = _scales(preconditioner, params)
    _require_steps(apply, params, source, channel, rates)
    _, direction = teacher_direction(None, direction, split_trainable(params)[0])
    opening = optax.tree.zeros_like(direction) if start is None else start

    def step(moved: PyTree, batch: Batch, rate: Array, _: Key[Array, ""]) -> tuple[PyTree, None]:
        product = gauss_newton(apply, params, batch.inputs, channel, batch.weights)
        return _advance(product, moved, direction, rate, scales), None

    return _along(step, opening, source, rates, key)[0]


def contraction(
    apply: Apply,
    params: PyTree,
    trait_loss: TraitLoss,
    source: Source | Buckets,
    channel: Channel,
    *,
    teacher_step: Scalar,
    rates: Rates,
    key: Key[Array, ""],
    preconditioner: PyTree = None,
    products: int = 30,
) -> Contraction:
    """Predict the change of the trait loss over many steps of a student, and the sharpness of each step.

    The run is `distill(..., source, channel, optax.sgd(rates), steps, key=key)`. The student starts at `params`.
    The teacher is at `params + teacher_step * D_T`, where D_T = -P grad(trait_loss). The prediction is exact to
    leading order in `teacher_step`, for rates of any size. The `verdict` of the result says whether the theory
    excludes a rise. The cost is `products` + 1 products with G per step. `displacement` only predicts, with one
    product per step. Pure: wrap it in `jax.jit`.

    Raises:
        InputError: as `displacement`; `teacher_step` is not positive and finite; the trait loss is not a scalar.
    """
    require_step("teacher_step", teacher_step)
    scales = _scales(preconditioner, params)
    _require_steps(apply, params, source, channel, rates, products)
    trained, _ = split_trainable(params)
    _, downhill = descent(of_trainable(params, trait_loss), trained)
    direction = downhill if scales is None else jax.tree.map(jnp.multiply, scales, downhill)

    def step(moved: PyTree, batch: Batch, rate: Array, key: Key[Array, ""]) -> tuple[PyTree, Sharpness]:
        product = gauss_newton(apply, params, batch.inputs, channel, batch.weights)
        found = _sharpness(product, trained, scales, key, products)
        return _advance(product, moved, direction, rate, scales), found

    moved, found = _along(step, optax.tree.zeros_like(direction), source, rates, key)
    return Contraction(-teacher_step * optax.tree.vdot(downhill, moved), jnp.asarray(rates), found)


def _along(
    step: Callable[..., Any], opening: PyTree, source: Source | Buckets, rates: Rates, key: Key[Array, ""]
) -> PyTree:
    """Scan `step` over the batches of `distill` and over the rates."""
    source_key, own = named(key, "source"), named(key, "sharpness")
    rates = jnp.asarray(rates)

    def one(carry: PyTree, scheduled: PyTree) -> PyTree:
        index, entry, rate = scheduled
        return with_batch(source, source_key, entry, lambda batch: step(carry, batch, rate, named(own, index)))

    count = rates.shape[0]
    return jax.lax.scan(one, opening, (jnp.arange(count), source.schedule(source_key, count), rates))


def _advance(product: Product, moved: PyTree, direction: PyTree, rate: Array, scales: PyTree) -> PyTree:
    """s + a P G (D_T - s)."""
    pull = product(jax.tree.map(jnp.subtract, direction, moved))
    pull = pull if scales is None else jax.tree.map(jnp.multiply, scales, pull)
    return jax.tree.map(lambda s, leaf: s + rate.astype(leaf.dtype) * leaf, moved, pull)


def _sharpness(product: Product, like: PyTree, scales: PyTree, key: Key[Array, ""], products: int) -> Sharpness:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    start = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    diagonal, off = lanczos(product, jax.tree.unflatten(structure, start), products, scales)
    values, residuals = ritz(diagonal, off)
    value = jnp.maximum(values[-1], 0)
    size = sum(leaf.size for leaf in leaves)
    error = (math.log(1.648 * math.sqrt(size) / DOUBT) / (2 * products - 1)) ** 2
    bound = value / (1 - error) if error < 1 else jnp.full_like(value, jnp.inf)
    # Once the Krylov space of a random start is exhausted, its Ritz values include every eigenvalue.
    exhausted = jnp.any(off == 0) | (size <= products)
    return Sharpness(value, jnp.where(exhausted, value, bound), residuals[-1])


def _scales(preconditioner: PyTree, params: PyTree) -> PyTree:
    """The preconditioner for the trainable parameters, in their dtypes."""
    if preconditioner is None:
        return None
    trained, _ = split_trainable(params)
    scales, _ = split_trainable(preconditioner)
    if jax.tree.map(jnp.shape, scales) != jax.tree.map(jnp.shape, trained):
        raise InputError("preconditioner must have the structure and shapes of params")
    for leaf in jax.tree.leaves(scales):
        if not isinstance(leaf, jax.core.Tracer) and not (np.isfinite(leaf) & (np.asarray(leaf) >= 0)).all():
            raise InputError("preconditioner must be finite and not negative")
    return jax.tree.map(lambda scale, leaf: jnp.asarray(scale, leaf.dtype), scales, trained)


def _require(apply: Apply, params: PyTree, inputs: PyTree, channel: Channel, products: int) -> None:
    if products < 2:
        raise InputError(f"products must be at least 2, got {products}")
    if not channel.exact:
        raise InputError(
            f"{type(channel).__name__} is not exact: sampled targets move a student by more than the teacher's "
            "step; use the channel of whole distributions"
        )
    refuse_wrong_channel(channel, jax.eval_shape(apply, params, inputs).shape[-1])


def _require_steps(
    apply: Apply, params: PyTree, source: Source | Buckets, channel: Channel, rates: Rates, products: int = 2
) -> None:
    if np.ndim(rates) != 1 or not np.shape(rates)[0]:
        raise InputError(f"rates must be a vector, one for each step, got shape {np.shape(rates)}")
    if not isinstance(rates, jax.core.Tracer) and not (np.isfinite(rates) & (np.asarray(rates) >= 0)).all():
        raise InputError("rates must be finite and not negative")
    batch = batch_shapes(source)
    if batch.labels is not None or batch.targets is not None:
        raise InputError("the source has labels or targets: give it only inputs, the teacher gives the targets")
    _require(apply, params, batch.inputs, channel, products)
