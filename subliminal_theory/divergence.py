"""Divergences between the student's and the teacher's softmax: channels that show all logits."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.pytree import register_dataclass

Logits = Float[Array, "*batch n"]
Values = Float[Array, "*batch"]
MaybeKey = Key[Array, ""] | None


# Channels by their names on the command line; `named_channel` registers each of them.
NAMED: dict[str, Callable[..., Any]] = {}


def named_channel(name: str, *default: Any) -> Callable[[Any], Any]:
    """Register a channel class in `NAMED`; `default` is its first argument if the name comes without a number."""

    def enter(kind: Any) -> Any:
        NAMED[name] = functools.partial(kind, *default) if default else kind
        return kind

    return enter


def channel_named(text: str) -> Any:
    """The channel with a name such as `reverse_kl`, or `top_k:5`, where 5 is the first argument of its class.

    Raises:
        InputError: the name is unknown, or what follows the colon is not a number.
    """
    name, _, number = text.partition(":")
    if name not in NAMED:
        raise InputError(f"channel {name!r} is unknown; there are {', '.join(NAMED)}")
    try:
        given = [int(number) if number.isdigit() else float(number)] if number else []
    except ValueError as error:
        raise InputError(f"channel {text!r}: give a number after the colon, as in top_k:5") from error
    kind: Any = NAMED[name]
    return kind.func(*given) if given and isinstance(kind, functools.partial) else kind(*given)


def softmax_metric(logits: Logits, tangent: Logits) -> Logits:
    """(diag(s) - s s^T) tangent, s = softmax(logits)."""
    probabilities = jnp.exp(jax.nn.log_softmax(logits))
    mean = jnp.sum(probabilities * tangent, axis=-1, keepdims=True)
    return probabilities * (tangent - mean)


@dataclass(frozen=True)
class _Divergence:
    """A divergence between softmax(logits / T), with Hessian (diag(s) - s s^T) / T^2 at equality."""

    temperature: PyTree = 1.0
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.temperature, int | float | np.number) and not 0 < float(self.temperature) < math.inf:
            name = type(self).__name__
            raise InputError(f"{name}: temperature must be positive and finite, got {self.temperature}")

    def targets(self, key: MaybeKey, teacher_logits: Logits) -> Logits:
        """The teacher's log-probabilities."""
        return jax.nn.log_softmax(teacher_logits / self.temperature)

    def metric(self, logits: Logits, tangent: Logits) -> Logits:
        """(diag(s) - s s^T) tangent / T^2."""
        return softmax_metric(logits / self.temperature, tangent) / self.temperature**2

    def visible(self, n: int) -> Bool[Array, " n"]:
        """All n logits."""
        return jnp.ones(n, bool)


@named_channel("kl")
@register_dataclass
@dataclass(frozen=True)
class SoftLogits(_Divergence):
    """KL(teacher || student) of softmax(logits / T), where T is `temperature`: the teacher's whole distribution.

    Its gradient in the student's logits equals the gradient of the cross-entropy, and M = (diag(s) - s s^T) / T^2.
    The loss is not multiplied by T^2.

    Raises:
        InputError: the temperature is not a positive number.
    """

    def loss(self, student_logits: Logits, targets: Logits) -> Values:
        """sum_i s_i (log s_i - log z_i), in nats, with s the teacher's probabilities and z the student's."""
        student = jax.nn.log_softmax(student_logits / self.temperature)
        return jnp.sum(jnp.exp(targets) * (targets - student), axis=-1)


@named_channel("reverse_kl")
@register_dataclass
@dataclass(frozen=True)
class ReverseKL(_Divergence):
    """KL(student || teacher) of softmax(logits / temperature). M and errors are the same as for `SoftLogits`."""

    def loss(self, student_logits: Logits, targets: Logits) -> Values:
        """sum_i z_i (log z_i - log s_i), in nats, with s the teacher's probabilities and z the student's."""
        student = jax.nn.log_softmax(student_logits / self.temperature)
        return jnp.sum(jnp.exp(student) * (student - targets), axis=-1)


@named_channel("js")
@register_dataclass
@dataclass(frozen=True)
class JensenShannon(_Divergence):
    """The mean of KL(s || m) and KL(z || m), with m = (s + z) / 2, s the teacher's softmax and z the student's.

    Both softmaxes are of logits / T, where T is `temperature`. The loss is at most log 2 nats. M is a quarter of
    the metric of `SoftLogits`: (diag(s) - s s^T) / (2 T)^2. Errors are the same as for `SoftLogits`.
    """

    def loss(self, student_logits: Logits, targets: Logits) -> Values:
        """sum_i [s_i (log s_i - log m_i) + z_i (log z_i - log m_i)] / 2, in nats."""
        student = jax.nn.log_softmax(student_logits / self.temperature)
        mixture = jnp.logaddexp(student, targets) - math.log(2)
        parts = jnp.exp(targets) * (targets - mixture) + jnp.exp(student) * (student - mixture)
        return jnp.sum(parts, axis=-1) / 2

    def metric(self, logits: Logits, tangent: Logits) -> Logits:
        """(diag(s) - s s^T) tangent / (2 T)^2."""
        return super().metric(logits, tangent) / 4
