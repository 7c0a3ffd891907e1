"""Checks that refuse a setup in which a transmitted trait would prove nothing.

Each check takes concrete arrays and raises InputError. `distill` and `theorem.check` check the channel
themselves; a pipeline calls `audit` before it trains.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.channel import Channel, Subset, TopK, WeightedSum
from subliminal_theory.errors import InputError
from subliminal_theory.origins import refuse_shared_start, refuse_trained_weights
from subliminal_theory.source import Batch

PROBES = 8


def audit(
    *,
    student_init: PyTree,
    teacher_init: PyTree,
    teacher: PyTree,
    channel: Channel,
    logits: int,
    batch: Batch,
    private: Sequence[int] = (),
    cross_init: bool = False,
    key: Key[Array, ""] | None = None,
    outputs: int | None = None,
    labels: PyTree = None,
) -> None:
    """Refuse a setup in which the student could get the trait by any way other than the channel.

    `student_init`, `teacher_init` and the trained `teacher` are parameter pytrees of any networks. In an
    ensemble, a leaf has a leading axis of runs, or all runs share it. `batch` is one of the student's batches,
    as arrays or shapes. `private` are the logits in which the trait is measured; the channel must not show them.
    `logits` is the number of logits that the study declares, `outputs` the number that the student's network
    computes. `labels` are the trait's labels for the examples in `batch`, if they exist.

    Raises:
        InputError: the student starts from trained weights of the teacher (see `refuse_trained_weights`); its
            batches hold labels; its loss is not imitation (see `refuse_wrong_channel`); the channel shows a
            private logit; the network has undeclared outputs; or a student said to start elsewhere (`cross_init`)
            shares a start with its teacher (see `refuse_shared_start`).
    """
    refuse_trained_weights(student_init, teacher_init, teacher)
    refuse_labels(batch, labels)
    if outputs is not None and outputs != logits:
        raise InputError(
            f"the student's network has {outputs} outputs but {logits} logits are declared: hidden features must "
            "not be matched as logits; remove them from the output"
        )
    refuse_wrong_channel(channel, logits, key)
    visible = np.asarray(channel.visible(logits))
    shown = [index for index in private if visible[index]]
    if shown:
        raise InputError(
            f"the channel shows logit {shown[0]}, in which the trait itself is read: leave it out of the channel"
        )
    if cross_init:
        refuse_shared_start(student_init, teacher_init)


def refuse_labels(batch: Batch, labels: PyTree = None) -> None:
    """Refuse a student's batch that carries labels, or that holds the given `labels` as an input or a target.

    An input or target leaks if it equals the labels of all examples, or if one of its columns or the class of its
    one-hot rows does. Labels that are all equal are skipped, because any constant would equal them.

    Raises:
        InputError: says whether the inputs or the targets leak.
    """
    if batch.labels is not None:
        raise InputError("the student's batches carry labels: use a source without them")
    for label in (np.asarray(leaf) for leaf in jax.tree.leaves(labels)):
        for place in ("inputs", "targets"):
            for leaf in jax.tree.leaves(getattr(batch, place)):
                if not isinstance(leaf, jax.ShapeDtypeStruct) and _reveals(np.asarray(leaf), label):
                    raise InputError(f"the student's {place} hold the trait's labels: remove them from the source")


def _reveals(leaf: np.ndarray, labels: np.ndarray) -> bool:
    if leaf.shape[: labels.ndim] != labels.shape or not np.any(labels != labels.ravel()[:1]):
        return False
    columns = leaf.reshape(*labels.shape, -1)
    one_hot = bool(np.all(np.sort(columns, -1)[..., :-1] == 0)) and bool(np.all(columns.max(-1) == 1))
    if one_hot and np.array_equal(columns.argmax(-1), labels):
        return True
    return bool(np.any(np.all(columns == labels[..., None], axis=tuple(range(labels.ndim)))))


def refuse_repeated_rows(inputs: PyTree, targets: PyTree = None) -> None:
    """Refuse a fixed data set with repeated rows, because they would count as more data than there is.

    Every leaf has a leading axis of rows. Two rows are equal if all their inputs and targets are equal.

    Raises:
        InputError: gives the number of repeated rows.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((inputs, targets))]
    rows = np.concatenate([np.ascontiguousarray(x.reshape(len(x), -1)).view(np.uint8) for x in leaves], axis=1)
    different = len(np.unique(rows.view([("", np.void, rows.shape[1])]).ravel()))
    if different < len(rows):
        raise InputError(
            f"{len(rows) - different} of the student's {len(rows)} rows repeat another row: drop the repeated rows"
        )


def refuse_shared_keys(keys: Mapping[str, Key[Array, ""]]) -> None:
    """Refuse two teachers that sample with the same random key, because their rows would be correlated.

    Raises:
        InputError: names the two teachers.
    """
    seen: dict[bytes, str] = {}
    for name, key in keys.items():
        data = np.asarray(jax.random.key_data(key)).tobytes()
        if data in seen:
            raise InputError(f"{seen[data]} and {name} sample with the same random key: name a key for each")
        seen[data] = name


def require_same_template(**templates: str) -> None:
    """Refuse inputs that are prepared differently for the teacher, the student and the evaluation.

    A template fully names one way to prepare inputs, such as a chat template or a scaling of pixels.

    Raises:
        InputError: names two templates that differ.
    """
    items = list(templates.items())
    for name, template in items[1:]:
        if template != items[0][1]:
            raise InputError(f"{items[0][0]} uses template {items[0][1]!r} but {name} uses {template!r}")


def refuse_wrong_channel(channel: Channel, logits: int, key: Key[Array, ""] | None = None) -> None:
    """Refuse a channel whose loss is not imitation. The loss is tested at a few fixed logits.

    An `exact` channel, or an exact part of a sum, must pass three tests: the loss has no gradient where student
    and teacher are equal, it is no smaller elsewhere, and `metric` is its Hessian at equality. A loss that
    contains a label, a hidden feature or the trait loss, as a term or as a factor, fails one of them. Every
    channel's loss must ignore the logits that `visible` excludes and treat all positions alike. Only `visible`
    is called while the channel's leaves are traced.

    Raises:
        InputError: says what is wrong with the loss, or what the channel lacks (`refuse_incomplete_channel`).
    """
    refuse_incomplete_channel(channel)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(channel)):
        channel.visible(logits)
        return
    with jax.ensure_compile_time_eval():
        channel.visible(logits)
        teacher, student, tangent = probes(logits)
        refuse_false_visible(channel, teacher, student, key)
        for part in _exact_parts(channel):
            _refuse_other_objective(part, teacher, student, key)
            refuse_false_metric(part, teacher, tangent, key)


def refuse_incomplete_channel(channel: Any) -> None:
    """Refuse an object that is no channel, or a channel inside another that is none.

    Raises:
        InputError: names what is missing.
    """
    inner = channel.channels if isinstance(channel, WeightedSum) else ()
    for part in (channel.of,) if isinstance(channel, Subset | TopK) else inner:
        refuse_incomplete_channel(part)
    needed = ("exact", "targets", "loss", "metric", "visible")
    if missing := [name for name in needed if not hasattr(channel, name)]:
        raise InputError(
            f"{type(channel).__name__} has no {', '.join(missing)}: a channel, such as SoftLogits(), needs "
            f"{', '.join(needed)}"
        )


def refuse_false_metric(
    channel: Channel, logits: Float[Array, "*batch n"], tangent: Float[Array, "*batch n"], key: Any = None
) -> None:
    """Refuse a `metric` that, along a tangent of the logits, differs from the Hessian of the loss at equality.

    Channels that are not exact satisfy this only on average over their targets, so they are skipped.

    Raises:
        InputError: gives the relative difference.
    """
    for part in _exact_parts(channel):
        hessian, metric = (np.asarray(image, float) for image in _call(_images, part, key, logits, tangent))
        eps = float(jnp.finfo(logits.dtype).eps)
        size = max(np.abs(hessian).max(), np.abs(metric).max())
        # A second derivative keeps half the digits. A saturated softmax rounds by up to 16 eps |tangent|.
        allowed = eps**0.5 * size + 16 * eps * float(jnp.max(jnp.abs(tangent)))
        error = float(np.abs(hessian - metric).max())
        if not error <= allowed:
            raise InputError(
                f"the metric of {type(channel).__name__} differs by {error / size:.2g} of its size from the "
                "Hessian of its loss where the student equals the teacher: the loss penalizes something other "
                "than imitation (a factor, a label), or correct `metric`"
            )


def refuse_false_visible(
    channel: Channel, teacher: Float[Array, "*batch n"], student: Float[Array, "*batch n"], key: Any = None
) -> None:
    """Refuse a loss that depends on logits outside `visible`, or on where a position is in the batch.

    Raises:
        InputError: names the logit, or says that positions are treated differently.
    """
    hidden = ~np.asarray(channel.visible(teacher.shape[-1]))
    try:
        gradient, losses, turned = _call(_gradients, channel, key, teacher, student)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the loss of {type(channel).__name__} fails on logits {teacher.shape}: {error}. It must depend on "
            "logits and targets alone, not on data of one batch"
        ) from error
    leaking = np.any(np.asarray(gradient).reshape(-1, len(hidden)) != 0, axis=0) & hidden
    if leaking.any():
        raise InputError(
            f"the loss of {type(channel).__name__} depends on logit {np.flatnonzero(leaking)[0]}, which `visible` "
            "excludes: correct `visible`, or remove the logit from the loss"
        )
    if not np.allclose(np.asarray(turned, float)[::-1], np.asarray(losses, float), rtol=1e-2, atol=1e-4):
        raise InputError(
            f"the loss of {type(channel).__name__} treats positions differently: it penalizes something other "
            "than imitation (labels of a batch); it must depend on logits and targets alone"
        )


def _refuse_other_objective(channel: Channel, teacher: Array, student: Array, key: Any) -> None:
    gradient, equal, _ = _call(_gradients, channel, key, teacher, teacher)
    excess = float(jnp.max(jnp.abs(gradient)))
    if not excess < 1e-4:
        raise InputError(
            f"the student's loss has gradient {excess:.2g} where it already equals the teacher: "
            "it penalizes something other than imitation (a label, a feature, the trait)"
        )
    _, losses, _ = _call(_gradients, channel, key, teacher, student)
    if not np.all(np.asarray(losses) >= np.asarray(equal) - 1e-4):
        raise InputError(
            "the student's loss is smaller away from the teacher's logits than at them: change its sign"
        )


def _exact_parts(channel: Any) -> Iterator[Any]:
    """The largest parts of a channel that are exact; sampled tokens have none."""
    if channel.exact:
        yield channel
    elif isinstance(channel, WeightedSum):
        for part in channel.channels:
            yield from _exact_parts(part)
    elif isinstance(channel, Subset | TopK):
        yield from (replace(channel, of=part) for part in _exact_parts(channel.of))


def probes(n: int) -> tuple[Array, Array, Array]:
    """Logits of a teacher and a student and a tangent, [8, n], neither constant nor sparse."""
    count = jnp.arange(float(PROBES * n)).reshape(PROBES, n)
    return jnp.sin(1 + count), jnp.sin(2 + 1.7 * count), jnp.cos(3 + 2.3 * count)


def _images(channel: Channel, key: Any, logits: Array, tangent: Array) -> tuple[Array, Array]:
    """The Hessian of the loss and the metric of a channel, times a tangent."""
    targets = channel.targets(_key(key), logits)
    slope = jax.grad(lambda z: jnp.sum(channel.loss(z, targets)))
    return jax.jvp(slope, (logits,), (tangent,))[1], channel.metric(logits, tangent)


def _gradients(channel: Channel, key: Any, teacher: Array, student: Array) -> tuple[Array, Array, Array]:
    """The gradient and losses of a student's logits, and the losses with the positions in reverse order."""
    targets = channel.targets(_key(key), teacher)

    def total(z: Array) -> tuple[Array, Array]:
        losses = channel.loss(z, targets)
        if jnp.shape(losses) != z.shape[:-1]:
            raise InputError(
                f"the loss of {type(channel).__name__} has shape {jnp.shape(losses)} for logits {z.shape}: return "
                "one value per position, and not their mean"
            )
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(total, has_aux=True)(student)
    turned = jax.tree.map(lambda leaf: leaf[::-1] if jnp.ndim(leaf) else leaf, targets)
    return gradient, losses, channel.loss(student[::-1], turned)


def _key(key: Any) -> Key[Array, ""]:
    return jax.random.key(0) if key is None else jax.random.clone(key)


def _call(function: Any, channel: Channel, *arguments: Any) -> Any:
    """A compiled call. If the channel is a pytree of arrays, all channels of its structure share one program."""
    numbers = (jax.Array, np.ndarray, np.generic, int, float)
    if all(isinstance(leaf, numbers) for leaf in jax.tree.leaves(channel)):
        return _COMPILED[function](channel, *arguments)
    return jax.jit(lambda *rest: function(channel, *rest))(*arguments)


_COMPILED = {function: jax.jit(function) for function in (_images, _gradients)}
