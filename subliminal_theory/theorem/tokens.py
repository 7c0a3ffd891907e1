"""How many sampled tokens carry a trait: as many as a likelihood ratio needs to tell the teacher from its base.

A student reads n tokens drawn from theta_T = theta_0 + eps D_T and takes one gradient step of cross-entropy. To
leading order in eps, with the metric M = diag(p) - p p^T of one drawn token,

    D_S . D_T has mean eps A and variance A / n,   eps^2 A = 2 KL(teacher || base) a token,
    P(D_S . D_T > 0) = Phi(eps sqrt(n A)) = Phi(sqrt(2 n KL)),

up to the central limit theorem. At another temperature than 1 this holds of D_S . D_T less its mean over the
base's tokens at the same positions. n (eps D_S . D_T - eps^2 A / 2) is the log-likelihood ratio of these tokens,
so n* = z^2 / (2 KL) is the number of tokens at which teacher and base are z standard deviations apart.
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
    """What tokens say of their teacher, means over positions; scalar arrays.

    Attributes:
        kl: KL(teacher || base) in nats a token that is read, within the visible logits.
        visible: the teacher's probability of the visible tokens; 1 if all are.
        kl_drawn: the same KL in nats a token drawn from all logits, where those that are hidden are dropped.
    """

    kl: PyTree
    visible: PyTree
    kl_drawn: PyTree

    def needed(self, z: float = Z) -> Float[Array, ""]:
        """Tokens to be read: `tokens_needed(kl, z)`."""
        return tokens_needed(self.kl, z)


def tokens_needed(kl: Num[ArrayLike, "..."], z: float = Z) -> Float[Array, "..."]:
    """n* = z^2 / (2 KL): so many tokens make the sign of D_S . D_T right with probability Phi(z).

    `kl` [...] is KL(teacher || base) in nats a token; infinitely many are needed at 0. The likelihood-ratio test
    whose level is 1 - Phi(z) has power 1/2 at n*, and power Phi(z) at 4 n*. Leading order in the teacher's step.

    Raises:
        InputError: z is not positive and finite.
    """
    if not 0 < z < math.inf:
        raise InputError(f"tokens_needed: z must be positive and finite, got {z}")
    # Rounding may leave a KL of equal laws below 0.
    return z**2 / (2 * jnp.maximum(jnp.asarray(kl, float), 0))


def sign_probability(tokens: Num[ArrayLike, "..."], kl: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
    """P(D_S . D_T > 0) = Phi(sqrt(2 n KL)) after n tokens of `kl` nats each; leading order."""
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
    `temperature`; `where` selects the logits that are visible, as in `Subset`. Exact.

    Raises:
        InputError: unlike shapes, a temperature that is not positive, no such logit, or none selected.
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
    """The tokens of a teacher that has made one step.

    Attributes:
        measured: at the teacher's step, exactly.
        predicted_kl: eps^2 A / 2, the leading order of the KL in nats a token.
    """

    measured: TokenSignal
    predicted_kl: PyTree

    def needed(self, z: float = Z) -> Float[Array, ""]:
        """Tokens to be read, by the measured KL."""
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
    """What the tokens of theta_0 + eps D_T say of their teacher, measured and to leading order.

    `direction` is D_T, a pytree like `params` (any displacement of a teacher, with `teacher_step` 1); the rest is
    as in `compare_tokens`. At a temperature T, A is the mean of (J D_T)^T M_T (J D_T) / T^2. Costs one
    Jacobian-vector product and one forward pass. Pure.

    Raises:
        InputError: as `compare_tokens`; the direction is unlike the parameters.
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
