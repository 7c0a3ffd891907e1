"""Where inputs come from: a source makes the batch of a step from a key, inside the step."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step's data; every leaf has a leading batch axis.

    `weights` has one entry per position of the logits, 0 for padding. `targets` are what a teacher
    transmitted beforehand (sampled tokens). `labels` teach a teacher; a student that is handed labels
    is refused.
    """

    inputs: PyTree
    weights: PyTree
    targets: PyTree = None
    labels: PyTree = None


@runtime_checkable
class Source(Protocol):
    """A pytree with a schedule for a whole run and a batch for each of its entries.

    `schedule(key, steps)` gives a pytree with leading axis `steps` that the run scans over;
    `batch(key, entry)` turns one of its entries into data, with the same key at every step.
    """

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree: ...

    def batch(self, key: Key[Array, ""], entry: PyTree) -> Batch: ...


def epoch_order(
    key: Key[Array, ""], examples: int, batch_size: int, steps: int
) -> tuple[Int[Array, "steps batch"], Float[Array, "steps batch"]]:
    """Indices of `steps` batches that pass over the examples in a new order each epoch, and their weights.

    An epoch has ceil(examples / batch_size) batches; the last one is filled up with index 0 at weight 0,
    so that its mean is over the examples that are left.
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


def _as_they_are(inputs: PyTree) -> PyTree:
    return inputs


@register_dataclass
@dataclass(frozen=True)
class Examples:
    """Stored examples, passed over in a new order each epoch.

    `inputs`, `labels` and `targets` are pytrees with one leading axis of examples; `prepare` maps a
    gathered batch of inputs to what the model takes (say bytes to [-1, 1]), so that the store stays small.
    `positions` [examples, ...] weigh the positions of each example, all the same if None.

    Raises:
        InputError: a batch size below 1, leaves of different lengths, or no example.
    """

    inputs: PyTree
    batch_size: int = field(metadata={"static": True})
    labels: PyTree = None
    targets: PyTree = None
    positions: PyTree = None
    prepare: Callable[[Any], PyTree] = field(default=_as_they_are, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"Examples: batch_size must be at least 1, got {self.batch_size}")
        leaves = jax.tree.leaves((self.inputs, self.labels, self.targets, self.positions))
        counts = {leaf.shape[0] for leaf in leaves if hasattr(leaf, "shape")}
        if len(counts) > 1:
            raise InputError(f"Examples: inputs, labels, targets and positions differ in number: {sorted(counts)}")
        if counts == {0}:
            raise InputError("Examples: there is no example")

    def without_labels(self) -> "Examples":
        """The same inputs for a student."""
        return replace(self, labels=None)

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree:
        """Indices and weights of every step."""
        examples = jax.tree.leaves(self.inputs)[0].shape[0]
        return epoch_order(key, examples, self.batch_size, steps)

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
    """Examples of several shapes, such as rows of like length, each batch from one of them.

    An epoch has the batches of all parts in a new order; the last batch of each part is filled up. The step is
    compiled once for each part, and a batch computes only what its part needs, unless the run is under a `vmap`
    whose runs are at different parts: run those one after the other.

    Raises:
        InputError: no part, parts of different batch sizes, or not all with labels, with targets, with positions.
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
        """The part of every step, and its indices and weights there."""
        size = self.parts[0].batch_size
        counts = [jax.tree.leaves(part.inputs)[0].shape[0] for part in self.parts]
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
    """`use(batch)` of an entry of a source's schedule; of `Buckets`, compiled for the shapes of every part."""
    if not isinstance(source, Buckets):
        return use(source.batch(key, entry))
    which, *inner = entry
    branches = [lambda inner, part=part: use(part.batch(key, inner)) for part in source.parts]
    return jax.lax.switch(which, branches, inner)


def batch_shapes(source: Source | Buckets) -> Batch:
    """The shapes of a batch, without computing it; of the last part of `Buckets`."""

    def first(key: Key[Array, ""]) -> Batch:
        one = source.parts[-1] if isinstance(source, Buckets) else source
        return one.batch(key, jax.tree.map(lambda leaf: leaf[0], one.schedule(key, 1)))

    return jax.eval_shape(first, jax.random.key(0))
