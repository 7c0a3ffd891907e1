"""The signal of the theorem: A = mean of (J D_T)^T M (J D_T), and whether it vanishes."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from subliminal_theory.audit import refuse_false_metric, refuse_wrong_channel
from subliminal_theory.channel import Channel, weighted_mean

ZERO_CASES = (
    "",
    "the trait loss is stationary: the teacher does not move",
    "blind channel: a softmax over one logit, or no logit of positive weight",
    "invisible trait: the teacher's step moves no logit that the channel sees",
    "logit shift: the step moves all visible logits alike, which a softmax cannot see",
    "no signal above rounding",
    "the direction is 0: the teacher does not move",
)


@dataclass(frozen=True)
class Signal:
    """The signal A at one point (`strength`), the logits, their tangent J D_T, and an index into `ZERO_CASES`."""

    logits: Array
    tangent: Array
    weights: Array
    strength: Array
    zero_code: Array

    def rounding(self, channel: Channel) -> Float[Array, ""]:
        """16 times what one unit in the last place of the logits does to D_S . D_T."""
        # It changes the gradient in the logits by M times itself.
        blur = channel.metric(self.logits, self.logits * signs(self.logits))
        eps = jnp.finfo(self.logits.dtype).eps
        return 16 * eps * weighted_mean(jnp.sum(jnp.abs(self.tangent * blur), axis=-1), self.weights)


def measure_signal(
    logits_of: Callable[[PyTree], Float[Array, "*batch n"]],
    params: PyTree,
    direction: PyTree,
    channel: Channel,
    weights: Float[Array, "*batch"] | None,
) -> Signal:
    """Measure A and whether it vanishes.

    A counts as zero if it is below the rounding error of its sums. To measure that error, the sums are repeated
    with every number of the direction and of its image moved up or down by one unit in the last place.

    Raises:
        InputError: the channel's loss is not imitation, or its `metric` or `visible` contradicts the loss.
    """
    logits, tangent = jax.jvp(logits_of, (params,), (direction,))
    nudged = jax.tree.map(lambda leaf: signs(leaf) * leaf * jnp.finfo(leaf.dtype).eps, direction)
    _, error = jax.jvp(logits_of, (params,), (nudged,))
    n = logits.shape[-1]
    refuse_wrong_channel(channel, n)
    visible = channel.visible(n)
    weights = jnp.ones(logits.shape[:-1], logits.dtype) if weights is None else weights
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in (logits, *jax.tree.leaves(channel))):
        refuse_false_metric(channel, logits, tangent)

    eps = jnp.finfo(logits.dtype).eps
    seen = channel.metric(logits, tangent)
    products = jnp.sum(tangent * seen, axis=-1)
    other = tangent * (1 + eps * signs(tangent)) + error
    noise = weighted_mean(jnp.abs(jnp.sum(other * channel.metric(logits, other), axis=-1) - products), weights)
    strength = weighted_mean(products, weights)
    zero = jnp.abs(strength) <= 16 * noise

    # At equal logits, if the metric is 0 for one direction that is neither constant nor sparse, it is 0 for all.
    # One position is enough, and many would be a constant as large as the logits, which XLA folds for minutes.
    flat = jnp.zeros(n, logits.dtype)
    probe = jnp.sin(1.0 + jnp.arange(n, dtype=logits.dtype))
    image, nudged_image = (channel.metric(flat, p) for p in (probe, probe * (1 + eps * signs(probe))))
    blind = jnp.all(jnp.abs(image) <= 16 * jnp.abs(nudged_image - image))

    counted = jnp.where((weights != 0)[..., None], visible, False)
    moved, unsure = (jnp.max(jnp.abs(jnp.where(counted, leaf, 0))) for leaf in (tangent, error))
    highest = jnp.max(tangent, axis=-1, where=counted, initial=-jnp.inf)
    spread = jnp.where(weights != 0, highest - jnp.min(tangent, axis=-1, where=counted, initial=jnp.inf), 0)
    shift = jnp.all(spread <= 16 * (eps * moved + unsure))
    code = jnp.where(zero & shift, 4, jnp.where(zero, 5, 0))
    code = jnp.where(blind, 2, jnp.where(moved <= 16 * unsure, 3, code))
    return Signal(logits, tangent, weights, strength, code)


def signs(leaf: Array) -> Array:
    """A pattern of signs without a period, in the shape of an array."""
    return jnp.sign(jnp.sin(1.0 + 3.7 * jnp.arange(leaf.size, dtype=leaf.dtype))).reshape(leaf.shape)
