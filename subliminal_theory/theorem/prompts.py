"""Prompted teachers: the theorem holds if the prompt changes the logits as a change of the parameters would.

The teacher is the model with a prompt c. The student imitates it on rows without the prompt. Let
delta(x) = f(c, x) - f(x) at theta_0, J the Jacobian of f(x) there, and M the metric of the channel. Then

    D_S . D_T = E <delta, J D_T>_M + O(|delta|^2),

and for squared error this is exact. It can have either sign. If delta = J v, this is Lemma 1 with D_T := v:
D_S . v = E <J v, J v>_M. So before any training, cos_M(delta, J D_T) says whether the student's step follows the
trait's direction. The least-squares shift v says how much of the prompt's effect the parameters can express. Any
other teacher whose logits are seen may take the place of the prompted one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.audit import refuse_wrong_channel
from subliminal_theory.channel import Channel, imitation_loss, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.model import Apply, split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.theorem.setting import of_trainable, teacher_direction


@register_dataclass
@dataclass(frozen=True)
class Alignment:
    """Inner products in the metric of the channel: scalar arrays, means over positions.

    To combine batches of equal size, take means of the fields.

    Attributes:
        overlap: E <delta, J D_T>_M, the leading order of `inner_product`.
        shown: E <delta, delta>_M.
        moved: E <J D_T, J D_T>_M, the A of Lemma 1.
        inner_product: D_S . D_T, exact.
    """

    overlap: PyTree
    shown: PyTree
    moved: PyTree
    inner_product: PyTree

    @property
    def cosine(self) -> PyTree:
        """cos_M(delta, J D_T); 0 if either is 0."""
        return _cosine(self.overlap, self.shown, self.moved)


def prompt_alignment(
    apply: Apply,
    params: PyTree,
    direction: PyTree,
    inputs: PyTree,
    teacher_logits: Float[Array, "..."],
    channel: Channel,
    *,
    weights: Float[Array, "*batch"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Alignment:
    """Compare the prompt's effect on the logits with the direction of a trait.

    `apply(params, inputs)` gives the logits [*batch, n] of the rows without the prompt. `teacher_logits` are the
    logits at the same positions after the prompt. `direction` is D_T, a pytree like `params`. `weights` [*batch]
    weight the mean over positions, 1 by default. A channel that samples needs a `key`; `inner_product` is then for
    one draw. The cost is one Jacobian-vector product. Pure.

    Raises:
        InputError: shapes differ; the channel selects logits that do not exist or has no output metric; the
            direction does not match the parameters.
    """
    trained, _ = split_trainable(params)
    _, direction = teacher_direction(None, direction, trained)
    logits, tangent = jax.jvp(of_trainable(params, lambda p: apply(p, inputs)), (trained,), (direction,))
    weights = _accepted(logits, teacher_logits, channel, weights)
    delta = teacher_logits - logits
    targets = channel.targets(key, teacher_logits)
    _, change = jax.jvp(lambda z: imitation_loss(channel, z, targets, weights), (logits,), (tangent,))
    product = _product(channel, logits, weights)
    return Alignment(product(delta, tangent), product(delta, delta), product(tangent, tangent), -change)


@register_dataclass
@dataclass(frozen=True)
class Shift:
    """The shift of the parameters whose effect on the logits is closest to that of the prompt.

    Attributes:
        direction: v, a pytree like the parameters (None where they have no gradient).
        cosine: cos_M(delta, J v), a lower bound on the cosine that the best v has.
        residual: |J^T M delta - (G + damping) v| / |J^T M delta|, the relative error of the solver.
    """

    direction: PyTree
    cosine: PyTree
    residual: PyTree


def prompt_shift(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    teacher_logits: Float[Array, "..."],
    channel: Channel,
    *,
    damping: float = 0.0,
    steps: int = 200,
    tolerance: float = 1e-6,
    weights: Float[Array, "*batch"] | None = None,
) -> Shift:
    """The v that minimizes E |delta - J v|^2_M + damping |v|^2.

    Conjugate gradients solve (G + damping) v = E J^T M delta with G = E J^T M J, where E is the mean over
    positions. `damping` has the units of G. The solver stops after `steps` steps, or when the relative residual is
    at most `tolerance`. Each step costs one Jacobian-vector product and one vector-Jacobian product. J and G are
    never built. Without damping, the solver converges to the solution of least norm. The other arguments are those
    of `prompt_alignment`. Pure.

    Raises:
        InputError: as `prompt_alignment`; `damping` is below 0 or infinite, `steps` is below 1, or `tolerance` is
            not positive and finite.
    """
    if not 0 <= damping < math.inf or steps < 1 or not 0 < tolerance < math.inf:
        raise InputError(
            f"prompt_shift: damping must be at least 0, steps at least 1 and tolerance above 0, got {damping}, "
            f"{steps} and {tolerance}"
        )
    trained, _ = split_trainable(params)
    logits, forward = jax.linearize(of_trainable(params, lambda p: apply(p, inputs)), trained)
    backward = jax.linear_transpose(forward, trained)
    weights = _accepted(logits, teacher_logits, channel, weights)
    delta = teacher_logits - logits
    shares = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)

    def pulled(values: Float[Array, "*batch n"]) -> PyTree:
        """J^T M times changes of the logits, a mean over positions."""
        return backward(shares[..., None] * channel.metric(logits, values))[0]

    def normal(v: PyTree) -> PyTree:
        return optax.tree.add_scale(pulled(forward(v)), damping, v)

    wanted = pulled(delta)
    found = _conjugate_gradients(normal, wanted, steps, tolerance)
    left, size = optax.tree.norm(optax.tree.sub(wanted, normal(found))), optax.tree.norm(wanted)
    moved, product = forward(found), _product(channel, logits, weights)
    cosine = _cosine(product(delta, moved), product(delta, delta), product(moved, moved))
    return Shift(found, cosine, jnp.where(size == 0, 0, left / jnp.where(size == 0, 1, size)))


def _conjugate_gradients(
    normal: Callable[[PyTree], PyTree], wanted: PyTree, steps: int, tolerance: float
) -> PyTree:
    """The solution of normal(x) = wanted, from 0, until |wanted - normal(x)| <= tolerance |wanted|.

    `jax.scipy.sparse.linalg.cg` is not used: on a transformer, its second step was nan (JAX 0.10.2).
    """
    enough = tolerance**2 * optax.tree.vdot(wanted, wanted)

    def unfinished(state: tuple[Array, PyTree, PyTree, PyTree, Array]) -> Array:
        return (state[0] < steps) & (state[4] > enough)

    def step(state: tuple[Array, PyTree, PyTree, PyTree, Array]) -> tuple[Array, PyTree, PyTree, PyTree, Array]:
        number, x, left, way, squared = state
        image = normal(way)
        length = squared / optax.tree.vdot(way, image)
        x, left = optax.tree.add_scale(x, length, way), optax.tree.add_scale(left, -length, image)
        new = optax.tree.vdot(left, left)
        return number + 1, x, left, optax.tree.add_scale(left, new / squared, way), new

    start = (jnp.zeros((), int), optax.tree.zeros_like(wanted), wanted, wanted, optax.tree.vdot(wanted, wanted))
    return jax.lax.while_loop(unfinished, step, start)[1]


def _accepted(
    logits: Float[Array, "*batch n"],
    teacher_logits: Float[Array, "..."],
    channel: Channel,
    weights: Float[Array, "*batch"] | None,
) -> Float[Array, "*batch"]:
    """The weights, 1 by default. Refuses logits of different shapes and channels that do not fit."""
    if teacher_logits.shape != logits.shape:
        raise InputError(f"teacher_logits have shape {teacher_logits.shape}, the student's {logits.shape}")
    refuse_wrong_channel(channel, logits.shape[-1])
    return jnp.ones(logits.shape[:-1], logits.dtype) if weights is None else weights


def _product(
    channel: Channel, logits: Float[Array, "*batch n"], weights: Float[Array, "*batch"]
) -> Callable[[Array, Array], Float[Array, ""]]:
    """E <a, b>_M at these logits."""
    return lambda a, b: weighted_mean(jnp.sum(a * channel.metric(logits, b), axis=-1), weights)


def _cosine(product: Array, first: Array, second: Array) -> Float[Array, ""]:
    length = jnp.sqrt(jnp.maximum(first, 0)) * jnp.sqrt(jnp.maximum(second, 0))
    return jnp.where(length == 0, 0, product / jnp.where(length == 0, 1, length))
