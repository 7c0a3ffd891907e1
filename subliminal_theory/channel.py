"""Channels: what the student sees of the teacher, and the loss of not matching it.

A channel has four methods and one property. No method reduces over positions.

* `targets(key, teacher_logits)`: what is transmitted, a pytree with one entry per position;
* `loss(student_logits, targets)`: one value per position; for the exact channels, 0 at equality;
* `metric(logits, tangent)`: M @ tangent, where M is the Hessian of the loss in the student's logits at equality.
  This is the output metric of Lemma 1 (doi 10.1038/s41586-026-10319-8). It is never built as a matrix;
* `visible(n)`: which of n logits the channel uses;
* `exact`: whether, for each target, the loss is smallest where the logits are equal. For a sampled token this
  holds only on average over tokens.

Two channels, `Subset` and `TopK`, hide logits before they call another channel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from subliminal_theory.divergence import Logits, MaybeKey, SoftLogits, Values, named_channel, softmax_metric
from subliminal_theory.errors import InputError
from subliminal_theory.pytree import register_dataclass

_BOOL = np.dtype(bool)


@runtime_checkable
class Channel(Protocol):
    """The four methods and the property above; see `SoftLogits` for their shapes."""

    @property
    def exact(self) -> bool: ...

    def targets(self, key: MaybeKey, teacher_logits: Logits) -> PyTree: ...

    def loss(self, student_logits: Logits, targets: PyTree) -> Values: ...

    def metric(self, logits: Logits, tangent: Logits) -> Logits: ...

    def visible(self, n: int) -> Bool[Array, " n"]: ...


def weighted_mean(
    values: Float[Array, "*batch"], weights: Float[Array, "*batch"], total: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """The one reduction of the project: sum(weights * values) / total, and 0 where the total is 0.

    `total` defaults to sum(weights). If the values are a part of a batch, give the weight of the whole batch; the
    results of the parts then add up. Prompt, padding and dropped positions weigh 0 and change nothing.
    """
    total = jnp.sum(weights) if total is None else total
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1)


def imitation_loss(
    channel: Channel,
    student_logits: Float[Array, "*batch n"],
    targets: PyTree,
    weights: Float[Array, "*batch"],
    total: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The student's loss: the weighted mean of the channel's losses."""
    return weighted_mean(channel.loss(student_logits, targets), weights, total)


def imitation_value_and_grad(
    channel: Channel,
    logits: Callable[[PyTree], Float[Array, "*batch n"]],
    params: PyTree,
    targets: PyTree,
    weights: Float[Array, "*batch"],
    total: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], PyTree]:
    """`imitation_loss` of `logits(params)` and its gradient in `params`.

    The theorem and every path of `distill` call this function, so the code that is verified is the code that
    trains.
    """
    return jax.value_and_grad(lambda p: imitation_loss(channel, logits(p), targets, weights, total))(params)


def _hidden(dtype: Any) -> float:
    """The constant that replaces hidden logits.

    It is a power of two, and the same number in every dtype but float16, so equal constants cancel. It is below
    any logit of a network, its softmax is exactly 0, and it stays finite when divided by a temperature of 1e-9.
    """
    return -(2.0 ** min(96, 3 * jnp.finfo(dtype).maxexp // 4))


def _hide(values: Logits, seen: Bool[Array, "..."]) -> Logits:
    return jnp.where(seen, values, _hidden(values.dtype))


def _everything(n: int) -> Bool[Array, " n"]:
    return jnp.ones(n, bool)


def _require_weights(name: str, weights: Any) -> None:
    numbers = weights if isinstance(weights, Sequence) else np.ravel(weights).tolist()
    if not all(0 <= float(weight) < math.inf for weight in numbers if isinstance(weight, int | float | np.number)):
        raise InputError(f"{name}: weights must be finite and not negative, got {list(numbers)}")


@named_channel("mse")
@register_dataclass
@dataclass(frozen=True)
class SquaredError:
    """Squared error of the logits: sum_i w_i (z_i - y_i)^2; M = 2 diag(w).

    `weights` is one non-negative number, or one per logit.

    Raises:
        InputError: a weight is negative or not finite.
    """

    weights: PyTree = 1.0
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.weights, Sequence):
            object.__setattr__(self, "weights", np.asarray(self.weights, float))
        if isinstance(self.weights, int | float | np.generic | np.ndarray):
            _require_weights("SquaredError", self.weights)

    def targets(self, key: MaybeKey, teacher_logits: Logits) -> Logits:
        """The teacher's logits."""
        return teacher_logits

    def loss(self, student_logits: Logits, targets: Logits) -> Values:
        """Weighted sum of squares, not their mean."""
        # Drop logits of weight 0 before squaring: a huge one would make the loss inf or nan.
        difference = jnp.where(self.visible(student_logits.shape[-1]), student_logits - targets, 0)
        return jnp.sum(self._weigh(jnp.square(difference)), axis=-1)

    def metric(self, logits: Logits, tangent: Logits) -> Logits:
        """2 w tangent."""
        return 2 * self._weigh(tangent)

    def visible(self, n: int) -> Bool[Array, " n"]:
        """The logits of positive weight."""
        return jnp.broadcast_to(jnp.asarray(self.weights) > 0, (n,))

    def _weigh(self, values: Logits) -> Logits:
        return values * jnp.broadcast_to(jnp.asarray(self.weights, values.dtype), values.shape)


@register_dataclass
@dataclass(frozen=True)
class SampledToken:
    """Cross-entropy on one token sampled from the teacher at a temperature; temperature 0 is greedy.

    At temperature 1, the gradient averaged over tokens is the gradient of `SoftLogits()`, and `metric` is the
    mean Hessian. At any other temperature, the mean loss is not smallest at the teacher's logits, and there is no
    metric.

    Raises:
        InputError: the temperature is negative or not finite; sampling has no key; the temperature has no metric.
    """

    temperature: float | int = field(default=1.0, metadata={"static": True})
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"SampledToken: temperature must be finite and not negative, got {self.temperature}")

    def targets(self, key: MaybeKey, teacher_logits: Logits) -> Int[Array, "*batch"]:
        """One token per position."""
        if self.temperature == 0:
            return jnp.argmax(teacher_logits, axis=-1)
        if key is None:
            raise InputError("SampledToken samples: give it a key, or temperature 0 for greedy tokens")
        return jax.random.categorical(key, teacher_logits / self.temperature)

    def loss(self, student_logits: Logits, targets: Int[Array, "*batch"]) -> Values:
        """-log softmax(z)[token], in nats."""
        return _cross_entropy(student_logits, targets)

    def metric(self, logits: Logits, tangent: Logits) -> Logits:
        """(diag(s) - s s^T) tangent, the expected Hessian over tokens."""
        if self.temperature != 1:
            raise InputError(f"SampledToken({self.temperature}) has no output metric: use temperature 1")
        return softmax_metric(logits, tangent)

    def visible(self, n: int) -> Bool[Array, " n"]:
        """All n logits."""
        return _everything(n)


def _cross_entropy(logits: Logits, tokens: Int[Array, "*batch"]) -> Values:
    below = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # Pick the token by comparison, so the gradient is one pass over the logits without a scatter.
    own = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1) == tokens[..., None]
    return jnp.log(jnp.sum(jnp.exp(below), axis=-1)) - jnp.sum(jnp.where(own, below, 0), axis=-1)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Subset:
    """Another channel restricted to some logits. A softmax is over those logits alone.

    `where` selects as in NumPy: integer indices, or a boolean mask with one entry per logit. Indices are static.
    A mask is data, so channels that see different logits can be stacked and run under one `vmap`.
    Every method raises InputError for an index outside 0..n-1, a mask of the wrong length, or an empty selection.
    """

    where: PyTree
    of: PyTree = field(default_factory=SoftLogits)
    exact = property(lambda self: self.of.exact)

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", _selection(self.where))

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Children and static part of the pytree."""
        return ((self.of, self.where), None) if not isinstance(self.where, tuple) else ((self.of,), self.where)

    @classmethod
    def tree_unflatten(cls, indices: Any, children: tuple[Any, ...]) -> "Subset":
        """The inverse of `tree_flatten`."""
        return cls(children[1] if indices is None else indices, children[0])

    def targets(self, key: MaybeKey, teacher_logits: Logits) -> PyTree:
        return self.of.targets(key, _hide(teacher_logits, self._chosen(teacher_logits.shape[-1])))

    def loss(self, student_logits: Logits, targets: PyTree) -> Values:
        return self.of.loss(_hide(student_logits, self._chosen(student_logits.shape[-1])), targets)

    def metric(self, logits: Logits, tangent: Logits) -> Logits:
        chosen = self._chosen(logits.shape[-1])
        return jnp.where(chosen, self.of.metric(_hide(logits, chosen), jnp.where(chosen, tangent, 0)), 0)

    def visible(self, n: int) -> Bool[Array, " n"]:
        return self._chosen(n) & self.of.visible(n)

    def _chosen(self, n: int) -> Bool[Array, " n"]:
        require_enough(self, np.ones(n, bool))
        return jnp.asarray(_mask(self.where, n))


def _selection(where: Any) -> Any:
    """Indices as a tuple of integers; a mask or a JAX placeholder unchanged."""
    if isinstance(where, Sequence) and where and all(isinstance(chosen, bool) for chosen in where):
        return np.asarray(where)
    if isinstance(where, Sequence) or getattr(where, "dtype", _BOOL) != _BOOL:
        return tuple(int(index) for index in where)
    return where


def _mask(where: Any, n: int) -> np.ndarray | Array:
    if not isinstance(where, tuple):
        if np.shape(where) != (n,):
            raise InputError(f"Subset: a mask of shape {np.shape(where)} for {n} logits")
        mask = where
    else:
        outside = [index for index in where if not 0 <= index < n]
        if outside:
            raise InputError(f"Subset: logit index {outside[0]} is outside 0..{n - 1}")
        mask = np.isin(np.arange(n), where)
    if isinstance(mask, np.ndarray) and not mask.any():
        raise InputError("Subset: no logit is selected")
    return mask


@named_channel("top_k", 2)
@register_dataclass
@dataclass(frozen=True)
class TopK:
    """Another channel restricted, at each position, to the teacher's k largest logits.

    The targets are (mask [*batch, n], targets of the inner channel on the masked logits), so the student is
    compared on the teacher's largest logits. Logits hidden by an outer `Subset` are never among the k.

    Raises:
        InputError: k is below 1, or above the number of logits that the channel sees.
    """

    k: int = field(metadata={"static": True})
    of: PyTree = field(default_factory=SoftLogits)
    exact = property(lambda self: self.of.exact)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"TopK: k must be at least 1, got {self.k}")

    def targets(self, key: MaybeKey, teacher_logits: Logits) -> PyTree:
        mask = self._largest(teacher_logits)
        return mask, self.of.targets(key, _hide(teacher_logits, mask))

    def loss(self, student_logits: Logits, targets: PyTree) -> Values:
        mask, inner = targets
        return self.of.loss(_hide(student_logits, mask), inner)

    def metric(self, logits: Logits, tangent: Logits) -> Logits:
        mask = self._largest(logits)
        return jnp.where(mask, self.of.metric(_hide(logits, mask), jnp.where(mask, tangent, 0)), 0)

    def visible(self, n: int) -> Bool[Array, " n"]:
        require_enough(self, np.ones(n, bool))
        return self.of.visible(n)

    def _largest(self, logits: Logits) -> Bool[Array, "*batch n"]:
        seen = _hide(logits, self.visible(logits.shape[-1]))
        _, chosen = jax.lax.top_k(seen, self.k)
        mask = jnp.put_along_axis(jnp.zeros(seen.shape, bool), chosen, True, axis=-1, inplace=False)
        return mask & (seen > _hidden(seen.dtype))


def require_enough(channel: Any, seen: np.ndarray | Array) -> None:
    """Refuse a `TopK` inside `channel` that keeps more logits than it can see.

    `seen` [n] are the logits that reach `channel`. A traced mask is not checked.

    Raises:
        InputError: gives k and the number of logits.
    """
    if isinstance(channel, WeightedSum):
        for part in channel.channels:
            require_enough(part, seen)
    elif isinstance(channel, Subset):
        mask = _mask(channel.where, seen.shape[0])
        require_enough(channel.of, seen if isinstance(mask, jax.core.Tracer) else seen & np.asarray(mask))
    elif isinstance(channel, TopK):
        require_enough(channel.of, seen)
        with jax.ensure_compile_time_eval():
            inner = channel.of.visible(seen.shape[0])
        count = int(np.sum(seen if isinstance(inner, jax.core.Tracer) else seen & np.asarray(inner)))
        if channel.k > count:
            raise InputError(f"TopK: k = {channel.k}, but only {count} logits are visible: use a smaller k")


@register_dataclass
@dataclass(frozen=True)
class WeightedSum:
    """sum_k w_k loss_k over several channels, such as imitation and a penalty for moving away from a base model.

    Each channel transmits its own targets; `weights` has one non-negative number per channel.

    Raises:
        InputError: there is no channel; the numbers of channels and weights differ; a weight is negative or not
            finite.
    """

    channels: PyTree
    weights: PyTree
    exact = property(lambda self: all(channel.exact for channel in self.channels))

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Sequence | np.ndarray | jax.Array):
            return  # a JAX placeholder
        shape = self.weights.shape if hasattr(self.weights, "shape") else (len(self.weights),)
        count = shape[-1] if shape else 0  # an ensemble has leading axes
        if not self.channels or count != len(self.channels):
            raise InputError(f"WeightedSum: {len(self.channels)} channels and {count} weights")
        if not isinstance(self.weights, jax.Array):
            _require_weights("WeightedSum", self.weights)

    def targets(self, key: MaybeKey, teacher_logits: Logits) -> tuple[PyTree, ...]:
        """The targets of each channel, each from its own random stream."""
        keys = [None if key is None else jax.random.fold_in(key, number) for number in range(len(self.channels))]
        return tuple(part.targets(own, teacher_logits) for part, own in zip(self.channels, keys, strict=True))

    def loss(self, student_logits: Logits, targets: tuple[PyTree, ...]) -> Values:
        losses = [part.loss(student_logits, own) for part, own in zip(self.channels, targets, strict=True)]
        return jnp.tensordot(jnp.asarray(self.weights), jnp.stack(losses), axes=1)

    def metric(self, logits: Logits, tangent: Logits) -> Logits:
        metrics = [channel.metric(logits, tangent) for channel in self.channels]
        return jnp.tensordot(jnp.asarray(self.weights), jnp.stack(metrics), axes=1)

    def visible(self, n: int) -> Bool[Array, " n"]:
        """The logits that at least one of the channels sees."""
        return jnp.any(jnp.stack([channel.visible(n) for channel in self.channels]), axis=0)
