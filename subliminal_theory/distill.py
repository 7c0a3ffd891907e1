"""Distillation: one update and one scanned run, the same for a toy and for a language model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, PyTree

from subliminal_theory.audit import refuse_wrong_channel
from subliminal_theory.channel import Channel, imitation_value_and_grad, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import BodyAndHead, Model, as_model, join, split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Batch, Buckets, Source, batch_shapes, with_batch


@register_dataclass
@dataclass(frozen=True)
class State:
    """A run after `step` of its steps. To resume, give it to `distill` with the same other arguments."""

    params: PyTree
    optimizer: PyTree
    step: PyTree


@register_dataclass
@dataclass(frozen=True)
class Trained:
    """A trained model, and the loss of every step before that step's update.

    `observed` is what `observe` returned, stacked over steps; `snapshots` are the models after the requested
    steps; `state` resumes the run. A run whose loss became infinite or nan goes on to its end: `diverged` says so.
    """

    model: Model
    losses: PyTree
    observed: PyTree = None
    snapshots: tuple[Model, ...] = ()
    state: State | None = None

    @property
    def diverged(self) -> Bool[Array, "..."]:
        """Whether a loss is not finite, for each run of an ensemble. `require_finite` names the step."""
        return ~jnp.isfinite(self.losses).all(-1)


@register_dataclass
@dataclass(frozen=True)
class Step:
    """One step before it is applied: the model, its gradient and its update."""

    index: PyTree
    model: Model
    gradient: PyTree
    update: PyTree


Observe = Callable[[Step], PyTree]
# From trainable parameters to the model that has them.
At = Callable[[PyTree], Model]
Found = tuple[Float[Array, ""], PyTree]
# From trainable parameters, the model, a batch and a key to the weighted mean of the batch's losses and its
# gradient. The last argument is the total weight if the batch is part of a larger one, else None.
ValueAndGrad = Callable[[PyTree, At, Batch, Key[Array, ""], Float[Array, ""] | None], Found]
# The same, and whether the model skips the update.
MayStop = Callable[[PyTree, At, Batch, Key[Array, ""], None], tuple[Float[Array, ""], PyTree, Bool[Array, ""]]]


def distill(
    student: Model | nnx.Module,
    teacher: Model | nnx.Module | None,
    channel: Channel,
    source: Source | Buckets,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    key: Key[Array, ""],
    observe: Observe | None = None,
    snapshots: Sequence[int] = (),
    chunk: int | None = None,
    state: State | None = None,
    count: int | None = None,
    accumulate: int = 1,
) -> Trained:
    """Train a student only on what a channel shows it of a teacher.

    Each step is `theta <- theta - update(grad E_x[loss(f_theta(x), targets)])`. The step calls the teacher. If
    the batches have targets that were sampled in advance, give `teacher=None`. The function is pure: `jax.jit` it
    with the models and the source as arguments, and `jax.vmap` it over students, channels, teachers or keys.
    Whatever is not mapped over (a shared teacher, shared inputs) is computed once for all runs. Parameters without
    a gradient (integers, booleans, random keys) do not change.

    Args:
        student: the model to train. It stays as it is; `Trained.model` has the new parameters.
        teacher: the model to imitate, with the student's logits; None if the batches have targets.
        channel: what the student sees of the teacher's logits, and its loss.
        source: gives the batches.
        optimizer: turns gradients into updates.
        steps: the number of steps of the whole run.
        key: the random key of the batches and of the channel.
        observe: is called at every step; its results are stacked over steps.
        snapshots: the model is kept after each of these steps, in ascending order.
        chunk: the most positions whose logits are in memory at once; both models must be `BodyAndHead`.
        state: the state to resume from; None starts the run.
        count: the number of steps that this call takes, by default all that are left. Calls with equal counts
            share one compiled program.
        accumulate: each batch is computed in this many equal parts, one after another. Their gradients add up to
            the gradient of the weighted mean.

    Raises:
        InputError: a model is none (`as_model`); the source has labels; a teacher and targets are both given, or
            both missing; student and teacher have different logits; the channel selects logits that do not exist,
            or its loss is not imitation (`audit.refuse_wrong_channel`); snapshots are not ascending steps of the
            run, or the call resumes a run and has snapshots; `count` is below 1 or above the number of steps left;
            `chunk` is below 1, or a model is not `BodyAndHead`; a batch cannot be cut into equal parts.
    """
    student, teacher = as_model(student), None if teacher is None else as_model(teacher)
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
        if not all(isinstance(model.apply, BodyAndHead) for model in (student, teacher) if model is not None):
            raise InputError("chunks need models with features and readout: leave chunk out")

    size = jax.tree.leaves(probe.inputs)[0].shape[0]
    if accumulate < 1 or size % accumulate:
        raise InputError(f"a batch of {size} cannot be accumulated in {accumulate} equal parts")

    def whole(params: PyTree, at: At, batch: Batch, key: Key[Array, ""], total: Float[Array, ""] | None) -> Found:
        targets = batch.targets if teacher is None else channel.targets(key, teacher(batch.inputs))
        logits = lambda p: at(p)(batch.inputs)  # noqa: E731
        return imitation_value_and_grad(channel, logits, params, targets, batch.weights, total)

    found = whole if chunk is None else _in_chunks(teacher, channel, chunk)
    found = found if accumulate == 1 else _accumulated(found, accumulate)
    return _run(student, found, source, optimizer, steps, key, observe, snapshots, state, count)


def _in_chunks(teacher: Model | None, channel: Channel, chunk: int) -> ValueAndGrad:
    """Compute a batch in chunks of positions. Logits are computed once, for both the loss and the gradient."""

    def found(params: PyTree, at: At, batch: Batch, key: Key[Array, ""], total: Float[Array, ""] | None) -> Found:
        read, back = jax.vjp(lambda p: _features(at(p), batch.inputs), params)
        taught = None if teacher is None else _features(teacher, batch.inputs)
        shape = read.shape[:-1]
        positions = math.prod(shape)
        chunks = -(-positions // chunk)
        size = -(-positions // chunks)  # equal sizes need the least padding
        total = jnp.sum(batch.weights) if total is None else total

        def cut(leaf: Array) -> Array:
            flat = leaf.reshape(positions, *leaf.shape[len(shape) :])
            filled = jnp.pad(flat, [(0, chunks * size - positions)] + [(0, 0)] * (flat.ndim - 1))
            return filled.reshape(chunks, size, *flat.shape[1:])

        def one(piece: PyTree) -> tuple[Found, Float[Array, "size width"]]:
            number, features, taught, targets, weights = piece
            if teacher is not None:
                targets = channel.targets(named(key, number), _readout(teacher, taught))
            logits = lambda both: _readout(at(both[0]), both[1])  # noqa: E731
            value, (own, through) = imitation_value_and_grad(
                channel, logits, (params, features), targets, weights, total
            )
            return (value, own), through

        pieces = (jnp.arange(chunks), *jax.tree.map(cut, (read, taught, batch.targets, batch.weights)))
        (value, own), gradients = _summed(one, pieces)
        (through,) = back(gradients.reshape(chunks * size, -1)[:positions].reshape(read.shape))
        return value, jax.tree.map(jnp.add, own, through)

    return found


def _features(model: Model, inputs: PyTree) -> Float[Array, "*batch width"]:
    return model.apply.features(model.all_params, inputs)  # type: ignore[attr-defined]


def _readout(model: Model, features: Float[Array, "chunk width"]) -> Float[Array, "chunk n"]:
    return model.apply.readout(model.all_params, features)  # type: ignore[attr-defined]


def _accumulated(one: ValueAndGrad, parts: int) -> ValueAndGrad:
    """Sum over equal parts of a batch."""

    def found(params: PyTree, at: At, batch: Batch, key: Key[Array, ""], total: Float[Array, ""] | None) -> Found:
        total = jnp.sum(batch.weights) if total is None else total
        cut = jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), batch)

        def part(piece: tuple[Array, Batch]) -> tuple[Found, None]:
            number, batch = piece
            return one(params, at, batch, named(key, number), total), None

        return _summed(part, (jnp.arange(parts), cut))[0]

    return found


def _summed(term: Callable[[PyTree], tuple[PyTree, PyTree]], pieces: PyTree) -> tuple[PyTree, PyTree]:
    """Sum the first result of `term` over pieces, in float32 or wider, and stack its second results."""
    shapes, _ = jax.eval_shape(term, jax.tree.map(lambda leaf: leaf[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)

    def add(sums: PyTree, piece: PyTree) -> tuple[PyTree, PyTree]:
        found, rest = term(piece)
        return jax.tree.map(lambda s, leaf: s + leaf.astype(s.dtype), sums, found), rest

    sums, rest = jax.lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda s, shape: s.astype(shape.dtype), sums, shapes), rest


def teach(
    model: Model | nnx.Module,
    loss: Callable[[Float[Array, "*batch n"], PyTree], Float[Array, "*batch"]],
    source: Source | Buckets,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    key: Key[Array, ""],
    observe: Observe | None = None,
    snapshots: Sequence[int] = (),
    state: State | None = None,
    count: int | None = None,
    until: float = 0.0,
) -> Trained:
    """Give a teacher its trait. This runs as `distill` does, with `loss(logits, labels)`, one value per position.

    With `until`, a step skips its update if its batch already has the trait: exp(-mean loss) over its positions of
    weight 1 or more is at least `until`. If every step takes all rows, training stops there for good.

    Raises:
        InputError: the model is none (`as_model`); the source has no labels; the loss is not one value per
            position, such as their mean; snapshots are not ascending steps of the run; `count` is below 1 or above
            the number of steps left; `until` is not in [0, 1).
    """
    if not 0 <= until < 1:
        raise InputError(f"teach: until must be from 0 to below 1, got {until}")
    model = as_model(model)
    if batch_shapes(source).labels is None:
        raise InputError("teaching a trait needs labels: the source brings none")

    def found(params: PyTree, at: At, batch: Batch, key: Key[Array, ""], total: Float[Array, ""] | None) -> Any:
        def mean(params: PyTree) -> tuple[Float[Array, ""], Float[Array, "*batch"]]:
            logits = at(params)(batch.inputs)
            losses = loss(logits, batch.labels)
            if losses.shape != logits.shape[:-1]:
                raise InputError(
                    f"teach: the loss has shape {losses.shape} for logits {logits.shape}: return one value per "
                    f"position, {logits.shape[:-1]}, and not their mean"
                )
            return weighted_mean(losses, batch.weights, total), losses

        (value, losses), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        if not until:
            return value, gradient
        own = jnp.where(batch.weights >= 1, batch.weights, 0)
        return value, gradient, weighted_mean(losses, own) <= -math.log(until)

    return _run(model, found, source, optimizer, steps, key, observe, snapshots, state, count)


def _run(
    model: Model,
    value_and_grad: ValueAndGrad | MayStop,
    source: Source | Buckets,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: Key[Array, ""],
    observe: Observe | None,
    snapshots: Sequence[int],
    state: State | None = None,
    count: int | None = None,
) -> Trained:
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    first: int | Array = 0 if state is None else state.step
    # Inside a compiled program the first step is traced; the number of steps is always known.
    known = None if isinstance(first, jax.core.Tracer) else int(first)
    if count is None:
        if known is None:
            raise InputError("a compiled piece of a run needs count, the number of its steps")
        count = steps - known
    if not 0 < count <= steps - (known or 0):
        raise InputError(f"a run of {steps} steps has no {count} steps after step {known or 0}")
    if state is not None and snapshots:
        raise InputError("a resumed run keeps no snapshots: leave them out")
    bounds = [0, *snapshots, count]
    if any(start >= stop for start, stop in zip(bounds[:-2], bounds[1:-1], strict=True)) or bounds[-2] > count:
        raise InputError(f"snapshots must be ascending steps from 1 to {count}, got {list(snapshots)}")
    source_key, channel_key = named(key, "source"), named(key, "channel")
    trained, rest = split_trainable(model.params if state is None else state.params)

    def at(params: PyTree) -> Model:
        return model.with_params(join(params, rest))

    def step(carry: PyTree, scheduled: PyTree) -> tuple[PyTree, tuple[Float[Array, ""], PyTree]]:
        params, state = carry
        index, entry = scheduled
        step_key = named(channel_key, index)

        def use(batch: Batch) -> tuple[Any, ...]:
            return value_and_grad(params, at, batch, step_key, None)

        value, gradient, *stays = with_batch(source, source_key, entry, use)
        update, after = optimizer.update(gradient, state, params)
        if stays:
            update = jax.tree.map(lambda leaf: jnp.where(stays[0], 0, leaf), update)
            after = jax.tree.map(lambda old, new: jnp.where(stays[0], old, new), state, after)
        seen = observe(Step(index, at(params), gradient, update)) if observe else None
        return (optax.apply_updates(params, update), after), (value, seen)

    schedule = (jnp.arange(steps), source.schedule(source_key, steps))
    carry = (trained, optimizer.init(trained) if state is None else state.optimizer)
    outputs, kept = [], []
    for start, stop in pairwise(bounds):
        piece = jax.tree.map(
            lambda leaf, start=start, stop=stop: jax.lax.dynamic_slice_in_dim(leaf, first + start, stop - start),
            schedule,
        )
        carry, output = jax.lax.scan(step, carry, piece)
        outputs.append(output)
        kept.append(at(carry[0]))
    values, observed = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
    end = State(kept[-1].params, carry[1], jnp.asarray(first + count, jnp.int32))
    return Trained(kept[-1], values, observed, tuple(kept[:-1]), end)


def require_compatible(student: Model, teacher: Model | None, channel: Channel, inputs: PyTree) -> None:
    """Refuse a student and a teacher with different logits, or a channel that does not fit them.

    Raises:
        InputError: their logits differ in shape, the channel selects logits that do not exist, or its loss is
            not imitation.
    """
    shape = jax.eval_shape(lambda model, x: model(x), student, inputs).shape
    if teacher is not None:
        taught = jax.eval_shape(lambda model, x: model(x), teacher, inputs).shape
        if shape != taught:
            raise InputError(f"student logits {shape} and teacher logits {taught} differ in shape")
    refuse_wrong_channel(channel, shape[-1])


def require_finite(losses: Float[Array, "..."] | Float[np.ndarray, "..."], runs: list[str]) -> None:
    """Refuse a training run that diverged.

    `losses` has shape [run, ..., steps]; `runs` names the entries of the leading axis.

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
