"""Refusals: set-ups in which a transmitted trait would prove nothing.

Each check takes concrete arrays, before anything is compiled or trained, and raises InputError.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.channel import Channel, SampledToken, Subset
from subliminal_theory.errors import InputError
from subliminal_theory.model import path_name
from subliminal_theory.source import Batch


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
) -> None:
    """Refuse a set-up in which the student could have the trait by another way than the channel.

    `student_init`, `teacher_init` and the trained `teacher` are parameter pytrees; ensembles have one
    leading axis in all three. `batch` is one of the student's; `private` are the logits in which the trait
    is read and which the channel must not show.

    Raises:
        InputError: the student starts from a trained weight of the teacher; it is handed labels; its loss
            is not least when it equals the teacher; the channel shows a private logit; or a student said to
            start elsewhere (`cross_init`) starts at its teacher's initialisation.
    """
    refuse_trained_weights(student_init, teacher_init, teacher)
    if batch.labels is not None:
        raise InputError("the student's batches carry labels: use a source without them")
    refuse_other_objectives(channel, logits, key)
    shown = [index for index in private if bool(channel.visible(logits)[index])]
    if shown:
        raise InputError(f"the channel shows logit {shown[0]}, in which the trait itself is read")
    if cross_init:
        refuse_fixed_points(student_init, teacher_init)


def refuse_trained_weights(student_init: PyTree, teacher_init: PyTree, teacher: PyTree) -> None:
    """Refuse a student that starts from what the teacher has learnt.

    Raises:
        InputError: names a parameter equal to the trained teacher's where training had changed it.
    """

    def one(path: object, student: Array, before: Array, after: Array) -> None:
        # Row by row: one leaking run of an ensemble is enough.
        rows = [np.reshape(leaf, (len(np.atleast_1d(leaf)), -1)) for leaf in (student, before, after)]
        leaked = np.all(rows[0] == rows[2], axis=1) & np.any(rows[1] != rows[2], axis=1)
        if leaked.any():
            raise InputError(
                f"the student starts from the TRAINED teacher's {path_name(path)}: "
                "start it from the teacher's initialisation"
            )

    if jax.tree.map(jnp.shape, student_init) == jax.tree.map(jnp.shape, teacher):
        jax.tree_util.tree_map_with_path(one, student_init, teacher_init, teacher)


def refuse_other_objectives(channel: Channel, logits: int, key: Key[Array, ""] | None = None) -> None:
    """Refuse a loss that pulls the student anywhere but to the teacher's outputs.

    An imitation loss has no gradient where the student's logits equal the teacher's; a label, a hidden
    feature or the trait loss mixed into it has. Sampled tokens satisfy it only on average over tokens and
    are passed over.

    Raises:
        InputError: gives the size of the gradient.
    """
    inner = channel
    while isinstance(inner, Subset):
        inner = inner.of
    if isinstance(inner, SampledToken):
        return
    probe = jnp.sin(1.0 + jnp.arange(8.0 * logits)).reshape(8, logits)
    targets = channel.targets(key, probe)
    gradient = jax.grad(lambda z: jnp.sum(channel.loss(z, targets)))(probe)
    excess = float(jnp.max(jnp.abs(gradient)))
    if not excess < 1e-4:
        raise InputError(
            f"the student's loss has gradient {excess:.2g} where it already equals the teacher: "
            "it charges for something else than imitation (a label, a feature, the trait)"
        )


def refuse_fixed_points(student_init: PyTree, teacher_init: PyTree) -> None:
    """Refuse a cross-init control in which a student starts where its own teacher started.

    Leaves have a leading axis of runs.

    Raises:
        InputError: names the runs, as positions on that axis.
    """

    def same(a: Float[Array, "runs ..."], b: Float[Array, "runs ..."]) -> np.ndarray:
        return np.all(np.asarray(a == b).reshape(a.shape[0], -1), axis=1)

    if jax.tree.map(jnp.shape, student_init) != jax.tree.map(jnp.shape, teacher_init):
        return
    fixed = np.all(jax.tree.leaves(jax.tree.map(same, student_init, teacher_init)), axis=0)
    if fixed.any():
        raise InputError(
            f"cross-init control with fixed points: runs {np.flatnonzero(fixed).tolist()} start at their own "
            "teacher's initialisation; use a derangement"
        )


def require_same_template(**templates: str) -> None:
    """Refuse inputs that are prepared in different ways for teacher, student and evaluation.

    A template names a preparation (a chat template, a scaling of pixels) completely.

    Raises:
        InputError: names two that differ.
    """
    items = list(templates.items())
    for name, template in items[1:]:
        if template != items[0][1]:
            raise InputError(f"{items[0][0]} uses template {items[0][1]!r} but {name} uses {template!r}")
