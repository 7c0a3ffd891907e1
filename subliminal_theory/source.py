"""Where inputs come from. A source makes the batch of a step from a key, inside the step."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Batch:
    """The data of one step. Every leaf has a leading batch axis.

    `weights` has one entry per position of the logits, 0 for padding. `targets` are what a teacher transmitted in
    advance (sampled tokens). `labels` are for teachers; `distill` refuses a batch that has them.
    """

    inputs: PyTree
    weights: PyTree
    targets: PyTree = None
    labels: PyTree = None


@runtime_checkable
class Source(Protocol):
    """A pytree with a schedule for a whole run and a batch for each of its entries.

    `schedule(key, steps)` gives a pytree with leading axis `steps`, and the run scans over it. `batch(key, entry)`
    turns one entry into data. The key is the same at every step.
    """

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree: ...

    def batch(self, key: Key[Array, ""], entry: PyTree) -> Batch: ...


def epoch_order(
    key: Key[Array, ""], examples: int, batch_size: int, steps: int
) -> tuple[Int[Array, "steps batch"], Float[Array, "steps batch"]]:
    """Indices and weights of `steps` batches. Each epoch passes over the examples in a new order.

    An epoch has ceil(examples / batch_size) batches. The last batch is padded with index 0 at weight 0, so its
    mean is over the remaining examples.
    """
    per_epoch = -(-examples // batch_size)
    epochs = -(-steps // per_epoch)
    keys = jax.vmap(lambda epoch: named(key, epoch))(jnp.arange(epochs))
    order = jax.vmap(lambda k: jax.random.permutation(k, examples))(keys)
    padding = per_epoch * batch_size - examples
    index = jnp.pad(order, ((0, 0), (0, padding)))
    weights = jnp.pad(jnp.ones((epochs, examples)), ((0, 0), (0, padding)))
    shape = (epochs * per_epoch, batch_size)
    return index.reshape(shape)[:steps], weights.reshape(shape)[:steps]


def _examples(inputs: PyTree) -> int:
    first = jax.tree.leaves(inputs)[0]
    if not hasattr(first, "shape"):
        raise InputError(
            f"Examples: inputs have a {type(first).__name__} where an array is wanted: use jnp.asarray"
        )
    return int(first.shape[0])


def _as_they_are(inputs: PyTree) -> PyTree:
    return inputs


@register_dataclass
@dataclass(frozen=True)
class Examples:
    """Stored examples, in a new order each epoch.

    `inputs`, `labels` and `targets` are pytrees with a leading axis of examples. `prepare` maps a batch of stored
    inputs to what the model takes (for example, bytes to [-1, 1]), so the stored data stays small. `positions`
    [examples, ...] are the weights of each example's positions; None weighs all positions equally.

    Raises:
        InputError: the batch size is no number from 1, the leaves have different lengths, there is no example, or
            (once batches are made) the inputs are lists of numbers and no arrays.
    """

    inputs: PyTree
    batch_size: int = field(metadata={"static": True})
    labels: PyTree = None
    targets: PyTree = None
    positions: PyTree = None
    prepare: Callable[[Any], PyTree] = field(default=_as_they_are, metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int | np.integer):
            raise InputError(
                f"Examples: batch_size must be a number, got {type(self.batch_size).__name__}; the order is "
                "Examples(inputs, batch_size, labels)"
            )
        if self.batch_size < 1:
            raise InputError(f"Examples: batch_size must be at least 1, got {self.batch_size}")
        leaves = jax.tree.leaves((self.inputs, self.labels, self.targets, self.positions))
        counts = {leaf.shape[0] for leaf in leaves if hasattr(leaf, "shape")}
        if len(counts) > 1:
            raise InputError(f"Examples: inputs, labels, targets and positions differ in number: {sorted(counts)}")
        if counts == {0}:
            raise InputError("Examples: there is no example")

    def without_labels(self) -> "Examples":
        """The same examples for a student, without labels."""
        return replace(self, labels=None)

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree:
        """Indices and weights of every step."""
        return epoch_order(key, _examples(self.inputs), self.batch_size, steps)

    def batch(self, key: Key[Array, ""], entry: PyTree) -> Batch:
        """Gather and prepare one batch."""
        index, weights = entry
        stored = (self.inputs, self.labels, self.targets, self.positions)
        inputs, labels, targets, positions = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], stored)
        if positions is not None:
            weights = jnp.expand_dims(weights, tuple(range(1, positions.ndim))) * positions
        return Batch(self.prepare(inputs), weights, targets, labels)


@register_dataclass
@dataclass(frozen=True)
class Buckets:
    """Examples in several parts, such as rows of similar length. Each batch comes from one part.

    An epoch has the batches of all parts in a new order. The last batch of each part is padded. The step is
    compiled once for each part, and a batch costs only what its part needs. Under a `vmap` whose runs take
    different parts at the same step, every batch costs as much as all parts together; train such runs one after
    another.

    Raises:
        InputError: there is no part; the parts have different batch sizes; or only some parts have labels, targets
            or positions.
    """

    parts: tuple[Examples, ...]

    def __post_init__(self) -> None:
        sizes = {part.batch_size for part in self.parts if isinstance(part, Examples)}
        if not self.parts or len(sizes) > 1:
            raise InputError(f"Buckets: give parts of one batch size, got {sorted(sizes) or 'none'}")
        for name in ("labels", "targets", "positions"):
            if len({getattr(part, name) is None for part in self.parts if isinstance(part, Examples)}) > 1:
                raise InputError(f"Buckets: some parts have {name} and some have none")

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree:
        """The part of every step, and the indices and weights within that part."""
        size = self.parts[0].batch_size
        counts = [_examples(part.inputs) for part in self.parts]
        batches = [-(-count // size) for count in counts]
        epochs = -(-steps // sum(batches))
        drawn = [
            jax.tree.map(
                lambda leaf, own=own: leaf.reshape(epochs, own, size),
                epoch_order(named(key, f"part {number}"), count, size, epochs * own),
            )
            for number, (count, own) in enumerate(zip(counts, batches, strict=True))
        ]
        index, weights = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *drawn)
        which = jnp.repeat(jnp.arange(len(batches)), jnp.asarray(batches), total_repeat_length=sum(batches))
        keys = jax.vmap(lambda epoch: named(named(key, "order"), epoch))(jnp.arange(epochs))
        order = jax.vmap(lambda own: jax.random.permutation(own, sum(batches)))(keys)
        found = (which[order], *(jnp.take_along_axis(leaf, order[..., None], axis=1) for leaf in (index, weights)))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:steps], found)


def with_batch(source: Source | Buckets, key: Key[Array, ""], entry: PyTree, use: Callable[[Batch], Any]) -> Any:
    """Call `use` on the batch of a schedule's entry. For `Buckets`, `use` is compiled once for every part."""
    if not isinstance(source, Buckets):
        return use(source.batch(key, entry))
    which, *inner = entry
    branches = [lambda inner, part=part: use(part.batch(key, inner)) for part in source.parts]
    return jax.lax.switch(which, branches, inner)


def batch_shapes(source: Source | Buckets) -> Batch:
    """The shapes of a batch, without computing it. For `Buckets`, a batch of the last part."""

    def first(key: Key[Array, ""]) -> Batch:
        one = source.parts[-1] if isinstance(source, Buckets) else source
        return one.batch(key, jax.tree.map(lambda leaf: leaf[0], one.schedule(key, 1)))

    return jax.eval_shape(first, jax.random.key(0))
