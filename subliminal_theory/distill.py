"""The verb of the project: one update, one scanned run, for a toy and for a language model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from subliminal_theory.channel import Channel, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import Divisible, Model
from subliminal_theory.source import Batch, Buckets, Source, batch_shapes, with_batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where a run stands after `step` of its steps; the rest of what it needs, it is called with again."""

    params: PyTree
    optimizer: PyTree
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trained:
    """A model after its run, and the loss of every step before that step's update.

    `observed` is what `observe` returned, stacked over steps; `snapshots` the models after the steps asked for;
    `state` is where to go on.
    """

    model: Model
    losses: Float[Array, " steps"]
    observed: PyTree = None
    snapshots: tuple[Model, ...] = ()
    state: State | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """What one step of a run is about to do: the model before it, its gradient and its update."""

    index: Int[Array, ""]
    model: Model
    gradient: PyTree
    update: PyTree


Observe = Callable[[Step], PyTree]
# One loss for each position of a batch.
Losses = Callable[[Model, Batch, Key[Array, ""]], Float[Array, "batch ..."]]
# The weighted mean of a batch's losses, and its gradient.
Slope = Callable[[Model, Batch, Key[Array, ""]], tuple[Float[Array, ""], PyTree]]


def distill(
    student: Model,
    teacher: Model | None,
    channel: Channel,
    source: Source | Buckets,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Key[Array, ""],
    *,
    observe: Observe | None = None,
    snapshots: Sequence[int] = (),
    chunk: int | None = None,
    state: State | None = None,
    count: int | None = None,
    accumulate: int = 1,
) -> Trained:
    """Train a student on what a channel lets it see of a teacher, and on nothing else.

    Step t takes `theta <- theta - update(grad E_x[loss(f_theta(x), targets)])`. The teacher is called
    inside the step, unless the batch brings targets sampled beforehand: then give `teacher=None`.
    A pure function: `jax.jit` it with the models and the source as arguments, and `jax.vmap` it over
    students, channels, teachers or keys. What is not mapped over (a shared teacher, shared inputs)
    is computed once for all. `observe` sees every step, and what it returns is streamed to the result;
    `snapshots` are the ascending numbers of steps after which to keep the model. With `chunk`, no more logits
    than those of so many positions are in memory at once; both models must be `Divisible`. A run of `steps` can
    be made in pieces: one goes on from `state` and makes `count` of them, all that are left if None; pieces of one
    length are one program. With `accumulate`, a batch is computed in so many parts, one after the other; their
    gradients sum to that of the whole batch's weighted mean.

    Raises:
        InputError: the source brings labels; both or neither of a teacher and targets are given;
            student and teacher have different logits; the channel selects logits that do not exist;
            snapshots are not ascending steps of the run, or are asked of a piece that goes on; a piece without
            steps, or with more than are left; a chunk below 1, or of models that do not divide;
            a batch that cannot be cut into so many equal parts.
    """
    probe = batch_shapes(source)
    if probe.labels is not None:
        raise InputError("a student must not see labels: give it a source without them")
    if (teacher is None) == (probe.targets is None):
        given = "neither a teacher nor targets" if teacher is None else "both a teacher and targets"
        raise InputError(f"distill got {given}: the source brings targets exactly when teacher is None")
    require_compatible(student, teacher, channel, probe.inputs)
    if chunk is not None:
        if chunk < 1:
            raise InputError(f"chunk must be at least 1, got {chunk}")
        if not all(isinstance(model.apply, Divisible) for model in (student, teacher) if model is not None):
            raise InputError("chunks need models of features and readout: leave chunk out")

    size = jax.tree.leaves(probe.inputs)[0].shape[0]
    if accumulate < 1 or size % accumulate:
        raise InputError(f"a batch of {size} cannot be accumulated in {accumulate} equal parts")

    def losses(model: Model, batch: Batch, step_key: Key[Array, ""]) -> Float[Array, "batch ..."]:
        targets = batch.targets if teacher is None else channel.targets(step_key, teacher(batch.inputs))
        return channel.loss(model(batch.inputs), targets)

    def in_chunks(model: Model, batch: Batch, step_key: Key[Array, ""]) -> tuple[Float[Array, ""], PyTree]:
        assert chunk is not None
        return _slope_in_chunks(model, teacher, channel, batch, step_key, chunk)

    slope = _slope_of(losses) if chunk is None else in_chunks
    return _run(student, slope, source, optimizer, steps, key, observe, snapshots, state, count, accumulate)


def _slope_in_chunks(
    student: Model, teacher: Model | None, channel: Channel, batch: Batch, key: Key[Array, ""], chunk: int
) -> tuple[Float[Array, ""], PyTree]:
    """The slope of a batch, chunk by chunk of its positions: logits are made once, for loss and gradient both."""

    def features(params: PyTree) -> Float[Array, "*batch width"]:
        return student.apply.features(student.with_params(params).all_params, batch.inputs)  # type: ignore[attr-defined]

    read, back = jax.vjp(features, student.params)
    taught = None if teacher is None else teacher.apply.features(teacher.all_params, batch.inputs)  # type: ignore[attr-defined]
    shape = read.shape[:-1]
    positions = math.prod(shape)
    chunks = -(-positions // chunk)
    total = jnp.sum(batch.weights)

    def cut(leaf: Array) -> Array:
        flat = leaf.reshape(positions, *leaf.shape[len(shape) :])
        filled = jnp.pad(flat, [(0, chunks * chunk - positions)] + [(0, 0)] * (flat.ndim - 1))
        return filled.reshape(chunks, chunk, *flat.shape[1:])

    def share(params: PyTree, features: Float[Array, "chunk width"], piece: PyTree) -> Float[Array, ""]:
        number, taught, targets, weights = piece
        logits = student.apply.readout(student.with_params(params).all_params, features)  # type: ignore[attr-defined]
        if teacher is not None:
            shown = teacher.apply.readout(teacher.all_params, taught)  # type: ignore[attr-defined]
            targets = channel.targets(named(key, number), shown)
        return jnp.sum(weights * channel.loss(logits, targets)) / jnp.where(total > 0, total, 1)

    def add(summed: PyTree, piece: tuple[Array, PyTree]) -> tuple[PyTree, Float[Array, "chunk width"]]:
        value, (own, slope) = jax.value_and_grad(share, argnums=(0, 1))(student.params, *piece)
        return jax.tree.map(lambda s, new: s + new.astype(s.dtype), summed, (value, own)), slope

    pieces = (jnp.arange(chunks), *jax.tree.map(cut, (taught, batch.targets, batch.weights)))
    (value, own), slopes = jax.lax.scan(add, _wide_zeros((total, student.params)), (cut(read), pieces))
    (through,) = back(slopes.reshape(chunks * chunk, -1)[:positions].reshape(read.shape))
    return value, jax.tree.map(lambda s, leaf: s.astype(leaf.dtype) + leaf, own, through)


def _wide_zeros(shapes: PyTree) -> PyTree:
    """To sum into: with at least the digits of float32, whatever the format."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)


def teach(
    model: Model,
    loss: Callable[[Float[Array, "*batch n"], PyTree], Float[Array, "*batch"]],
    source: Source | Buckets,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Key[Array, ""],
    *,
    observe: Observe | None = None,
    snapshots: Sequence[int] = (),
    state: State | None = None,
    count: int | None = None,
) -> Trained:
    """Give a teacher its trait: the run of `distill` with `loss(logits, labels)`, one value per position.

    Raises:
        InputError: the source brings no labels; snapshots are not ascending steps of the run; a piece without
            steps, or with more than are left.
    """
    if batch_shapes(source).labels is None:
        raise InputError("teaching a trait needs labels: the source brings none")

    def losses(model: Model, batch: Batch, step_key: Key[Array, ""]) -> Float[Array, "batch ..."]:
        return loss(model(batch.inputs), batch.labels)

    return _run(model, _slope_of(losses), source, optimizer, steps, key, observe, snapshots, state, count)


def _run(
    model: Model,
    slope: Slope,
    source: Source | Buckets,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Key[Array, ""],
    observe: Observe | None,
    snapshots: Sequence[int],
    state: State | None = None,
    count: int | None = None,
    accumulate: int = 1,
) -> Trained:
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    first: int | Array = 0 if state is None else state.step
    # Within a compiled program the first step is no number yet; the length of a piece always is one.
    known = None if isinstance(first, jax.core.Tracer) else int(first)
    if count is None:
        if known is None:
            raise InputError("a compiled piece of a run needs count, the number of its steps")
        count = steps - known
    if not 0 < count <= steps - (known or 0):
        raise InputError(f"a run of {steps} steps has no {count} steps after step {known or 0}")
    if state is not None and snapshots:
        raise InputError("a piece that goes on keeps no snapshots: leave them out")
    bounds = [0, *snapshots, count]
    if any(start >= stop for start, stop in zip(bounds[:-2], bounds[1:-1], strict=True)) or bounds[-2] > count:
        raise InputError(f"snapshots must be ascending steps from 1 to {count}, got {list(snapshots)}")
    source_key, channel_key = named(key, "source"), named(key, "channel")

    def step(carry: PyTree, scheduled: PyTree) -> tuple[PyTree, tuple[Float[Array, ""], PyTree]]:
        params, state = carry
        index, entry = scheduled
        step_key = named(channel_key, index)

        def slope_of(batch: Batch) -> tuple[Float[Array, ""], PyTree]:
            return _accumulated(model.with_params(params), slope, batch, step_key, accumulate)

        value, gradient = with_batch(source, source_key, entry, slope_of)
        update, state = optimizer.update(gradient, state, params)
        seen = observe(Step(index, model.with_params(params), gradient, update)) if observe else None
        return (optax.apply_updates(params, update), state), (value, seen)

    schedule = (jnp.arange(steps), source.schedule(source_key, steps))
    carry = (model.params, optimizer.init(model.params)) if state is None else (state.params, state.optimizer)
    outputs, kept = [], []
    for start, stop in pairwise(bounds):
        piece = jax.tree.map(
            lambda leaf, start=start, stop=stop: jax.lax.dynamic_slice_in_dim(leaf, first + start, stop - start),
            schedule,
        )
        carry, output = jax.lax.scan(step, carry, piece)
        outputs.append(output)
        kept.append(model.with_params(carry[0]))
    values, observed = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
    return Trained(
        kept[-1], values, observed, tuple(kept[:-1]), State(*carry, jnp.asarray(first + count, jnp.int32))
    )


def _slope_of(losses: Losses) -> Slope:
    def mean(params: PyTree, model: Model, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        return weighted_mean(losses(model.with_params(params), batch, key), batch.weights)

    return lambda model, batch, key: jax.value_and_grad(mean)(model.params, model, batch, key)


def _accumulated(
    model: Model, slope: Slope, batch: Batch, key: Key[Array, ""], parts: int
) -> tuple[Float[Array, ""], PyTree]:
    """The slope of a batch, summed over equal parts of it."""
    if parts == 1:
        return slope(model, batch, key)
    total = jnp.sum(batch.weights)
    cut = jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), batch)

    def add(summed: PyTree, piece: tuple[Array, Batch]) -> tuple[PyTree, None]:
        number, part = piece
        found = slope(model, part, named(key, number))
        share = jnp.sum(part.weights) / jnp.where(total > 0, total, 1)
        return jax.tree.map(lambda s, own: s + share * own.astype(s.dtype), summed, found), None

    shapes = jax.eval_shape(slope, model, jax.tree.map(lambda leaf: leaf[0], cut), key)
    summed, _ = jax.lax.scan(add, _wide_zeros(shapes), (jnp.arange(parts), cut))
    return jax.tree.map(lambda s, shape: s.astype(shape.dtype), summed, shapes)


def require_compatible(student: Model, teacher: Model | None, channel: Channel, inputs: PyTree) -> None:
    """Refuse a student and a teacher that do not speak over the same logits.

    Raises:
        InputError: their logits differ in shape, or the channel selects logits that do not exist.
    """
    shape = jax.eval_shape(lambda model, x: model(x), student, inputs).shape
    if teacher is not None:
        taught = jax.eval_shape(lambda model, x: model(x), teacher, inputs).shape
        if shape != taught:
            raise InputError(f"student logits {shape} and teacher logits {taught} differ in shape")
    channel.visible(shape[-1])


def require_finite(losses: Float[Array, "..."], runs: list[str]) -> None:
    """Refuse a diverged training run, once its losses are on the host.

    `losses` is [run, ..., steps], `runs` names the leading axis.

    Raises:
        InputError: names the first run that diverged and its step.
    """
    values = np.asarray(losses)
    for name, run in zip(runs, values.reshape(len(runs), -1, values.shape[-1]), strict=True):
        bad = ~np.isfinite(run)
        if bad.any():
            step = int(bad.any(0).argmax())
            raise InputError(
                f"the loss of {name} is not finite at step {step + 1} of {run.shape[-1]}: "
                "use a smaller learning rate"
            )
