"""What of the teacher the student may see, and how it is charged for missing it.

A channel has four methods, none of which ever reduces over positions:

* `targets(key, teacher_logits)`: what is transmitted;
* `loss(student_logits, targets)`: one value per position, 0 at equality for the soft channels;
* `metric(logits, tangent)`: M @ tangent, M the Hessian of the loss in the student's logits at equality,
  the output metric of Lemma 1 (doi 10.1038/s41586-026-10319-8), never built as a matrix;
* `visible(n)`: which of n logits it looks at at all.

Each takes `where`, a boolean mask over the logits, by which `Subset` narrows any other channel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from subliminal_theory.errors import InputError

Where = Bool[Array, " n"] | None
_BOOL = np.dtype(bool)


@runtime_checkable
class Channel(Protocol):
    """The four methods above; see `SoftLogits` for their shapes."""

    def targets(
        self, key: Key[Array, ""] | None, teacher_logits: Float[Array, "*batch n"], where: Where = None
    ) -> Any: ...

    def loss(
        self, student_logits: Float[Array, "*batch n"], targets: Any, where: Where = None
    ) -> Float[Array, "*batch"]: ...

    def metric(
        self, logits: Float[Array, "*batch n"], tangent: Float[Array, "*batch n"], where: Where = None
    ) -> Float[Array, "*batch n"]: ...

    def visible(self, n: int) -> Bool[Array, " n"]: ...


def weighted_mean(values: Float[Array, "*batch"], weights: Float[Array, "*batch"]) -> Float[Array, ""]:
    """The one reduction of the project: sum(weights * values) / sum(weights), and 0 where nothing weighs.

    Prompt, padding and dropped positions weigh 0 and change nothing.
    """
    total = jnp.sum(weights)
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1)


def imitation_loss(
    channel: Channel,
    student_logits: Float[Array, "*batch n"],
    targets: Array,
    weights: Float[Array, "*batch"],
) -> Float[Array, ""]:
    """The student's loss, which the theorem verifies; `distill` descends these losses under this reduction."""
    return weighted_mean(channel.loss(student_logits, targets), weights)


def _mask(logits: Float[Array, "*batch n"], where: Where) -> Float[Array, "*batch n"]:
    if where is None:
        return logits
    # Half the lowest number: its softmax is exactly 0, and sums with it stay finite.
    return jnp.where(where, logits, 0.5 * jnp.finfo(logits.dtype).min)


def _log_softmax(logits: Float[Array, "*batch n"], where: Where) -> Float[Array, "*batch n"]:
    return jax.nn.log_softmax(_mask(logits, where))


def _softmax_metric(
    logits: Float[Array, "*batch n"], tangent: Float[Array, "*batch n"], where: Where
) -> Float[Array, "*batch n"]:
    probabilities = jnp.exp(_log_softmax(logits, where))
    mean = jnp.sum(probabilities * tangent, axis=-1, keepdims=True)
    return probabilities * (tangent - mean)


def _everything(n: int) -> Bool[Array, " n"]:
    return jnp.ones(n, bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftLogits:
    """KL(teacher || student) of softmax(logits / temperature): the teacher's whole distribution.

    Its gradient in the student's logits is that of the cross-entropy, and M = (diag(s) - s s^T) / T^2.
    The loss is not rescaled by T^2.

    Raises:
        InputError: the temperature is not a positive number.
    """

    temperature: float | Float[Array, ""] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, int | float | np.generic) and not 0 < self.temperature < math.inf:
            raise InputError(f"SoftLogits: temperature must be positive and finite, got {self.temperature}")

    def targets(
        self, key: Key[Array, ""] | None, teacher_logits: Float[Array, "*batch n"], where: Where = None
    ) -> Float[Array, "*batch n"]:
        """The teacher's log-probabilities."""
        return _log_softmax(teacher_logits / self.temperature, where)

    def loss(
        self,
        student_logits: Float[Array, "*batch n"],
        targets: Float[Array, "*batch n"],
        where: Where = None,
    ) -> Float[Array, "*batch"]:
        """sum_i s_i (log s_i - log z_i), in nats."""
        student = _log_softmax(student_logits / self.temperature, where)
        return jnp.sum(jnp.exp(targets) * (targets - student), axis=-1)

    def metric(
        self,
        logits: Float[Array, "*batch n"],
        tangent: Float[Array, "*batch n"],
        where: Where = None,
    ) -> Float[Array, "*batch n"]:
        """(diag(s) - s s^T) tangent / T^2."""
        return _softmax_metric(logits / self.temperature, tangent, where) / self.temperature**2

    def visible(self, n: int) -> Bool[Array, " n"]:
        """All n logits."""
        return _everything(n)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SquaredError:
    """sum_i w_i (z_i - y_i)^2 on the logits themselves; M = 2 diag(w).

    `weights` is one non-negative number or one per logit.

    Raises:
        InputError: a weight is negative or not finite.
    """

    weights: ArrayLike | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.weights, Sequence):
            object.__setattr__(self, "weights", np.asarray(self.weights, float))
        if isinstance(self.weights, int | float | np.generic | np.ndarray):
            weights = np.asarray(self.weights)
            if not (np.isfinite(weights).all() and (weights >= 0).all()):
                raise InputError(f"SquaredError: weights must be finite and not negative, got {weights}")

    def targets(
        self, key: Key[Array, ""] | None, teacher_logits: Float[Array, "*batch n"], where: Where = None
    ) -> Float[Array, "*batch n"]:
        """The teacher's logits."""
        return teacher_logits

    def loss(
        self,
        student_logits: Float[Array, "*batch n"],
        targets: Float[Array, "*batch n"],
        where: Where = None,
    ) -> Float[Array, "*batch"]:
        """Weighted sum of squares, not their mean."""
        seen = self.visible(student_logits.shape[-1])
        # Masked before it is squared: an unseen logit of any size must not reach the loss as inf or nan.
        difference = jnp.where(seen if where is None else seen & where, student_logits - targets, 0)
        return jnp.sum(self._weigh(jnp.square(difference), where), axis=-1)

    def metric(
        self,
        logits: Float[Array, "*batch n"],
        tangent: Float[Array, "*batch n"],
        where: Where = None,
    ) -> Float[Array, "*batch n"]:
        """2 w tangent."""
        return 2 * self._weigh(tangent, where)

    def visible(self, n: int) -> Bool[Array, " n"]:
        """The logits of positive weight."""
        return jnp.broadcast_to(jnp.asarray(self.weights) > 0, (n,))

    def _weigh(self, values: Float[Array, "*batch n"], where: Where) -> Float[Array, "*batch n"]:
        weighted = values * jnp.broadcast_to(jnp.asarray(self.weights, values.dtype), values.shape)
        return weighted if where is None else jnp.where(where, weighted, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledToken:
    """Cross-entropy on one token sampled from the teacher at a temperature; 0 is greedy.

    At temperature 1 the mean of its gradients over tokens is the gradient of `SoftLogits()`.

    Raises:
        InputError: the temperature is negative or not finite.
    """

    temperature: float = field(default=1.0, metadata={"static": True})

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"SampledToken: temperature must be finite and not negative, got {self.temperature}")

    def targets(
        self, key: Key[Array, ""] | None, teacher_logits: Float[Array, "*batch n"], where: Where = None
    ) -> Int[Array, "*batch"]:
        """One token per position.

        Raises:
            InputError: a temperature above 0 without a key.
        """
        logits = _mask(teacher_logits, where)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        if key is None:
            raise InputError("SampledToken samples: give it a key, or temperature 0 for greedy tokens")
        return jax.random.categorical(key, _mask(teacher_logits / self.temperature, where))

    def loss(
        self,
        student_logits: Float[Array, "*batch n"],
        targets: Int[Array, "*batch"],
        where: Where = None,
    ) -> Float[Array, "*batch"]:
        """-log softmax(z)[token], in nats."""
        logits = _mask(student_logits, where)
        below = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        # Picked by comparison: the gradient is then one pass over the logits, without zeros to scatter into.
        own = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
        return jnp.log(jnp.sum(jnp.exp(below), axis=-1)) - jnp.sum(jnp.where(own, below, 0), axis=-1)

    def metric(
        self,
        logits: Float[Array, "*batch n"],
        tangent: Float[Array, "*batch n"],
        where: Where = None,
    ) -> Float[Array, "*batch n"]:
        """(diag(s) - s s^T) tangent, the metric in expectation over the token.

        Raises:
            InputError: any temperature but 1, where the loss has no minimum at the teacher's logits.
        """
        if self.temperature != 1:
            raise InputError(
                f"SampledToken at temperature {self.temperature} has no output metric: its expected loss "
                "is not least at the teacher's logits, so the theorem does not cover it; use temperature 1"
            )
        return _softmax_metric(logits, tangent, where)

    def visible(self, n: int) -> Bool[Array, " n"]:
        """All n logits."""
        return _everything(n)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Subset:
    """Another channel that sees only some logits; a softmax is then over those alone.

    `where` selects as in NumPy: integer indices, or a boolean mask with one entry per logit. Indices are
    static. A mask is data, so channels that see different logits can be stacked and run under one `vmap`.
    """

    where: Bool[Array, " n"] | Sequence[int]
    of: Channel = field(default_factory=SoftLogits)

    def __post_init__(self) -> None:
        if isinstance(self.where, Sequence) and self.where and all(isinstance(x, bool) for x in self.where):
            object.__setattr__(self, "where", np.asarray(self.where))
        if not self._is_mask:
            object.__setattr__(self, "where", tuple(int(index) for index in self.where))

    @property
    def _is_mask(self) -> bool:
        # Tree transformations put placeholders without a dtype in the place of data.
        return not isinstance(self.where, Sequence) and getattr(self.where, "dtype", _BOOL) == _BOOL

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Children and static part of the pytree."""
        return ((self.of, self.where), None) if self._is_mask else ((self.of,), self.where)

    @classmethod
    def tree_unflatten(cls, indices: Any, children: tuple[Any, ...]) -> "Subset":
        """The inverse of `tree_flatten`."""
        return cls(children[1], children[0]) if indices is None else cls(indices, children[0])

    def targets(
        self, key: Key[Array, ""] | None, teacher_logits: Float[Array, "*batch n"], where: Where = None
    ) -> Array:
        """Targets of the narrowed channel."""
        return self.of.targets(key, teacher_logits, self._narrow(teacher_logits.shape[-1], where))

    def loss(
        self, student_logits: Float[Array, "*batch n"], targets: Array, where: Where = None
    ) -> Float[Array, "*batch"]:
        """Loss of the narrowed channel."""
        return self.of.loss(student_logits, targets, self._narrow(student_logits.shape[-1], where))

    def metric(
        self,
        logits: Float[Array, "*batch n"],
        tangent: Float[Array, "*batch n"],
        where: Where = None,
    ) -> Float[Array, "*batch n"]:
        """Metric of the narrowed channel, 0 outside."""
        return self.of.metric(logits, tangent, self._narrow(logits.shape[-1], where))

    def visible(self, n: int) -> Bool[Array, " n"]:
        """The selected logits that the inner channel sees too.

        Raises:
            InputError: an index outside 0..n-1, a mask of another length, or nothing selected.
        """
        return self._narrow(n, self.of.visible(n))

    def _narrow(self, n: int, where: Where) -> Bool[Array, " n"]:
        if self._is_mask:
            chosen = jnp.asarray(self.where)
            if chosen.shape != (n,):
                raise InputError(f"Subset: a mask of shape {chosen.shape} for {n} logits")
            if isinstance(self.where, np.ndarray) and not self.where.any():
                raise InputError("Subset: no logit is selected")
        else:
            outside = [index for index in self.where if not 0 <= index < n]
            if outside or not len(self.where):
                what = f"logit index {outside[0]} is outside 0..{n - 1}" if outside else "no logit is selected"
                raise InputError(f"Subset: {what}")
            chosen = jnp.zeros(n, bool).at[jnp.asarray(self.where)].set(True)
        return chosen if where is None else chosen & where


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightedSum:
    """sum_k w_k loss_k over several channels at once, such as imitation and a penalty for leaving a base model.

    Each channel transmits its own targets; `weights` has one non-negative number per channel.

    Raises:
        InputError: there is no channel, or the number of weights is another; a weight is negative or not finite.
    """

    channels: Sequence[Channel]
    weights: Sequence[float] | Float[Array, " channels"]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Sequence | np.ndarray | jax.Array):
            return  # a placeholder of a transformation
        shape = self.weights.shape if hasattr(self.weights, "shape") else (len(self.weights),)
        count = shape[-1] if shape else 0  # of an ensemble, weights have leading axes
        if not self.channels or count != len(self.channels):
            raise InputError(f"WeightedSum: {len(self.channels)} channels and {count} weights")
        if isinstance(self.weights, jax.Array):
            return
        if not all(
            0 <= weight < math.inf for weight in self.weights if isinstance(weight, int | float | np.generic)
        ):
            raise InputError(f"WeightedSum: weights must be finite and not negative, got {list(self.weights)}")

    def targets(
        self, key: Key[Array, ""] | None, teacher_logits: Float[Array, "*batch n"], where: Where = None
    ) -> tuple[Array, ...]:
        """The targets of each channel, each with a random stream of its own."""
        keys = [None if key is None else jax.random.fold_in(key, number) for number in range(len(self.channels))]
        pairs = zip(self.channels, keys, strict=True)
        return tuple(channel.targets(own, teacher_logits, where) for channel, own in pairs)

    def loss(
        self, student_logits: Float[Array, "*batch n"], targets: tuple[Array, ...], where: Where = None
    ) -> Float[Array, "*batch"]:
        """The weighted sum of the channels' losses."""
        pairs = zip(self.channels, targets, strict=True)
        losses = [channel.loss(student_logits, target, where) for channel, target in pairs]
        return jnp.tensordot(jnp.asarray(self.weights), jnp.stack(losses), axes=1)

    def metric(
        self,
        logits: Float[Array, "*batch n"],
        tangent: Float[Array, "*batch n"],
        where: Where = None,
    ) -> Float[Array, "*batch n"]:
        """The weighted sum of the channels' metrics."""
        metrics = [channel.metric(logits, tangent, where) for channel in self.channels]
        return jnp.tensordot(jnp.asarray(self.weights), jnp.stack(metrics), axes=1)

    def visible(self, n: int) -> Bool[Array, " n"]:
        """The logits that any of the channels sees."""
        return jnp.any(jnp.stack([channel.visible(n) for channel in self.channels]), axis=0)
