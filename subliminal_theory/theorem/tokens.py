"""How many sampled tokens carry a trait: the number by which a likelihood-ratio test tells teacher from base.

A student reads n tokens drawn from theta_T = theta_0 + eps D_T and takes one gradient step on their cross-entropy.
Let M = diag(p) - p p^T be the metric of one drawn token. To leading order in eps,

    D_S . D_T has mean eps A and variance A / n,   eps^2 A = 2 KL(teacher || base) per token,
    P(D_S . D_T > 0) = Phi(eps sqrt(n A)) = Phi(sqrt(2 n KL)).

The normal distribution is an approximation, by the central limit theorem. At a temperature other than 1, subtract
from D_S . D_T its mean over the base's tokens at the same positions; the result then holds for the difference. The
log-likelihood ratio of the tokens is n (eps D_S . D_T - eps^2 A / 2). So at n* = z^2 / (2 KL) tokens, teacher and
base are z standard deviations apart.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Num, PyTree

from subliminal_theory.channel import SoftLogits, Subset, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.model import Apply, split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.theorem.setting import of_trainable, teacher_direction

Z = 1.96  # the sign is right with probability .975


@register_dataclass
@dataclass(frozen=True)
class TokenSignal:
    """What tokens reveal about their teacher: scalar arrays, means over positions.

    Attributes:
        kl: KL(teacher || base) within the visible logits, in nats per token read.
        visible: the teacher's probability of a visible token; 1 if all tokens are visible.
        kl_drawn: the same KL in nats per token drawn from all logits, if hidden tokens are then dropped.
    """

    kl: PyTree
    visible: PyTree
    kl_drawn: PyTree

    def needed(self, z: float = Z) -> Float[Array, ""]:
        """The number of tokens to read: `tokens_needed(kl, z)`."""
        return tokens_needed(self.kl, z)


def tokens_needed(kl: Num[ArrayLike, "..."], z: float = Z) -> Float[Array, "..."]:
    """n* = z^2 / (2 KL), the number of tokens that give D_S . D_T the right sign with probability Phi(z).

    `kl` [...] is KL(teacher || base) in nats per token; n* is infinite at 0. The likelihood-ratio test of level
    1 - Phi(z) has power 1/2 at n* tokens, and power Phi(z) at 4 n*. Leading order in the teacher's step.

    Raises:
        InputError: z is not positive and finite.
    """
    if not 0 < z < math.inf:
        raise InputError(f"tokens_needed: z must be positive and finite, got {z}")
    # Rounding can make the KL of two equal distributions negative.
    return z**2 / (2 * jnp.maximum(jnp.asarray(kl, float), 0))


def sign_probability(tokens: Num[ArrayLike, "..."], kl: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
    """P(D_S . D_T > 0) = Phi(sqrt(2 n KL)) after n tokens with a KL of `kl` nats per token. Leading order."""
    drift = 2 * jnp.asarray(tokens, float) * jnp.maximum(jnp.asarray(kl, float), 0)
    return jax.scipy.stats.norm.cdf(jnp.sqrt(drift))


def compare_tokens(
    teacher_logits: Float[Array, "*batch n"],
    base_logits: Float[Array, "..."],
    *,
    weights: Float[Array, "*batch"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    where: Any = None,
) -> TokenSignal:
    """How far apart teacher and base are, from their logits [*batch, n] at the same positions.

    `weights` [*batch] say how often each position is read, 1 by default and 0 for padding. Tokens are drawn at
    `temperature`. `where` selects the visible logits, as in `Subset`. Exact.

    Raises:
        InputError: the shapes differ; the temperature is not positive; `where` selects a logit that does not
            exist, or none.
    """
    if teacher_logits.shape != base_logits.shape:
        raise InputError(f"teacher_logits {teacher_logits.shape} and base_logits {base_logits.shape} differ")
    soft = SoftLogits(temperature)
    seen = soft if where is None else Subset(where, soft)
    weights = jnp.ones(teacher_logits.shape[:-1], teacher_logits.dtype) if weights is None else weights
    kl = seen.loss(base_logits, seen.targets(None, teacher_logits))
    probabilities = jnp.exp(soft.targets(None, teacher_logits))
    shown = seen.visible(teacher_logits.shape[-1])
    mass = jnp.ones_like(kl) if where is None else jnp.sum(jnp.where(shown, probabilities, 0), axis=-1)
    return TokenSignal(*(weighted_mean(value, weights) for value in (kl, mass, mass * kl)))


@register_dataclass
@dataclass(frozen=True)
class StepSignal:
    """The tokens of a teacher that has taken one step.

    Attributes:
        measured: the exact `TokenSignal` of the teacher.
        predicted_kl: eps^2 A / 2, the leading order of the KL in nats per token read.
    """

    measured: TokenSignal
    predicted_kl: PyTree

    def needed(self, z: float = Z) -> Float[Array, ""]:
        """The number of tokens to read, from the measured KL."""
        return self.measured.needed(z)


def step_tokens(
    apply: Apply,
    params: PyTree,
    direction: PyTree,
    inputs: PyTree,
    *,
    teacher_step: float | Float[Array, ""],
    weights: Float[Array, "*batch"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    where: Any = None,
) -> StepSignal:
    """What the tokens of theta_0 + eps D_T reveal about their teacher, measured and to leading order.

    `direction` is D_T, a pytree like `params`. For any displacement of a teacher, give it as `direction` with
    `teacher_step` 1. The other arguments are as in `compare_tokens`. At a temperature T, A is the mean of
    (J D_T)^T M_T (J D_T) / T^2. The cost is one Jacobian-vector product and one forward pass. Pure.

    Raises:
        InputError: as `compare_tokens`; the direction does not match the parameters.
    """
    trained, _ = split_trainable(params)
    logits_of = of_trainable(params, lambda p: apply(p, inputs))
    _, direction = teacher_direction(None, direction, trained)
    logits, tangent = jax.jvp(logits_of, (trained,), (direction,))
    taught = logits_of(optax.tree.add_scale(trained, teacher_step, direction))
    measured = compare_tokens(taught, logits, weights=weights, temperature=temperature, where=where)
    seen = SoftLogits(temperature) if where is None else Subset(where, SoftLogits(temperature))
    weights = jnp.ones(logits.shape[:-1], logits.dtype) if weights is None else weights
    strength = weighted_mean(jnp.sum(tangent * seen.metric(logits, tangent), axis=-1), weights)
    return StepSignal(measured, teacher_step**2 * strength / 2)
