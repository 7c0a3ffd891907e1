"""Where a student's weights come from: refuse trained weights of the teacher, and an undeclared shared start.

Parameters are compared leaf by leaf and run by run. Leaves with the same name and shape are compared number by
number. Leaves with the same size are also compared as multisets, which finds renamed, transposed, reshaped and
permuted copies. Everything runs on the host, in one pass over the parameters.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.model import leaves_by_path

# Above this many numbers, multisets are compared by moments instead of sorted values.
SORTED = 50_000_000
# Fewer numbers than this say nothing about a direction. For two independent draws of 144 numbers, a cosine above
# 0.5 is six standard deviations away and has a probability of 1e-9.
DIRECTION = 144


def refuse_trained_weights(student_init: PyTree, teacher_init: PyTree, teacher: PyTree) -> None:
    """Refuse a student that starts from what the teacher has learned.

    Let d_T = teacher - teacher_init and d_S = student_init - teacher_init, both minus their components along
    teacher_init. In a legitimate start, each leaf has d_S = 0 (shared) or d_S independent of d_T. The cosine of
    two independent vectors of n numbers is about normal with standard deviation n^-1/2. The component along
    teacher_init is removed because weight decay moves the teacher toward 0, and a fresh draw has a component in
    the same direction. Leaves that training did not change are skipped.

    Raises:
        InputError: names a parameter that equals the trained teacher's, lies on the way to it, or has the same
            numbers as another parameter of the trained teacher.
    """
    runs = _runs(teacher)
    student, before, after = (_leaves(tree, runs) for tree in (student_init, teacher_init, teacher))
    trained = {
        name: end
        for name, end in after.items()
        if name in before and before[name].shape[1:] == end.shape[1:] and (before[name] != end).any()
    }
    sums = np.zeros((3, 1))
    numbers = 0
    for name, end in trained.items():
        if name in student and student[name].shape[1:] == end.shape[1:]:
            begun, start, stop = _rows(student[name], before[name], end)
            if _arrived(begun, start, stop).any():
                raise _refusal("starts from", name)
            own = _displacements(begun, start, stop)
            if _along(own, stop.shape[1]).any():
                raise _refusal("starts on the way to", name)
            sums, numbers = sums + own, numbers + stop.shape[1]
    if _along(sums, numbers).any():
        raise _refusal("starts on the way to", "parameters")
    for name, other in _copies(student, trained, before):
        raise _refusal("starts from", f"{other} as its {name}")


def refuse_shared_start(student_init: PyTree, teacher_init: PyTree) -> None:
    """Refuse a cross-init control that shares a start with its own teacher.

    A leaf is shared if it equals the teacher's leaf up to 1e-3 of its standard deviation, or has the same numbers
    in another order, because a network with permuted neurons computes the same function. Leaves with few distinct
    numbers, such as zero biases and unit scales, do not count.

    Raises:
        InputError: names the runs (as indices on the leading axis) that start at their own teacher's
            initialization, or a layer that is shared or permuted.
    """
    runs = _runs(teacher_init)
    student, before = _leaves(student_init, runs), _leaves(teacher_init, runs)
    telling = {name: leaf for name, leaf in before.items() if _telling(leaf)}
    same = {
        name: _same(*_rows(student[name], start))
        for name, start in telling.items()
        if name in student and student[name].shape[1:] == start.shape[1:]
    }
    if same and len(same) == len(telling) and (fixed := np.all(list(same.values()), axis=0)).any():
        raise InputError(
            f"cross-init control with fixed points: runs {np.flatnonzero(fixed).tolist()} start at their own "
            "teacher's initialization; use a derangement"
        )
    for name, shared in same.items():
        if shared.any():
            raise InputError(
                f"cross-init control: run {np.argmax(shared)} shares {name} with its own teacher's "
                "initialization; draw every layer anew, or declare a shared start"
            )
    for name, other in _copies(student, telling):
        raise InputError(
            f"cross-init control: {name} holds the numbers of the teacher's initial {other} in another order, "
            "which is the same start with its neurons permuted; draw it anew"
        )


def _refusal(how: str, what: str) -> InputError:
    return InputError(
        f"the student {how} the TRAINED teacher's {what}: start it from the teacher's initialization"
    )


def _runs(tree: PyTree) -> int:
    """The length of the leading axis that all leaves share, or 1 if they share none."""
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(tree)}
    return lengths.pop() if len(lengths) == 1 and 0 not in lengths else 1


def _leaves(tree: PyTree, runs: int) -> dict[str, np.ndarray]:
    """Floating-point leaves by name, [runs, ...], or [1, ...] if all runs share the leaf."""
    floating = {
        name: np.asarray(leaf)
        for name, leaf in leaves_by_path(tree).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size
    }
    own = {name: runs > 1 and leaf.ndim > 0 and leaf.shape[0] == runs for name, leaf in floating.items()}
    return {name: leaf if own[name] else leaf[None] for name, leaf in floating.items()}


def _rows(*leaves: np.ndarray) -> Iterator[np.ndarray]:
    """Leaves as [runs, numbers] in float64. Shared leaves are repeated."""
    runs = max(len(leaf) for leaf in leaves)
    return (
        np.broadcast_to(leaf.reshape(len(leaf), -1).astype(np.float64), (runs, leaf[0].size)) for leaf in leaves
    )


def _norm(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(rows * rows, axis=1))


def _arrived(begun: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which runs start at the trained numbers or, with 8 numbers or more, have under a tenth of the way left."""
    way, left = _norm(end - start), _norm(end - begun)
    return (way > 0) & ((left == 0) | ((left < 0.1 * way) & (end.shape[1] >= 8)))


def _displacements(begun: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """d_S . d_T, d_S . d_S and d_T . d_T of each run. Components along the start are removed from both."""

    def across(rows: np.ndarray) -> np.ndarray:
        squared = np.sum(start * start, axis=1, keepdims=True)
        share = np.sum(rows * start, axis=1, keepdims=True) / np.where(squared > 0, squared, 1)
        return rows - share * start

    student, teacher = across(begun - start), across(end - start)
    return np.stack(
        [np.sum(a * b, axis=1) for a, b in ((student, teacher), (student, student), (teacher, teacher))]
    )


def _along(sums: np.ndarray, numbers: int) -> np.ndarray:
    product, student, teacher = sums
    length = np.sqrt(student * teacher)
    return (product > 0.5 * length) & (length > 0) & (numbers >= DIRECTION)


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return _norm(one - other) <= 1e-3 * _norm(other - other.mean(axis=1, keepdims=True))


def _telling(leaf: np.ndarray) -> bool:
    """Whether a leaf has at least two numbers, and more than half of them are distinct."""
    row = leaf[0].ravel()
    return row.size > 1 and len(np.unique(row)) > row.size / 2


def _copies(
    student: dict[str, np.ndarray], given: dict[str, np.ndarray], before: dict[str, np.ndarray] | None = None
) -> Iterator[tuple[str, str]]:
    """Names of student leaves that have the numbers of a given leaf in any order, with the name of that leaf.

    Sorted values of two independent draws differ by far more than 1e-3 of their standard deviation, most of all at
    the ends. With `before`, a copy must also be ten times closer to the given leaf than that leaf was before
    training.
    """
    large = sum(leaf.size for leaf in (*student.values(), *given.values())) > SORTED
    signatures = {name: _signature(leaf, large) for name, leaf in student.items() if leaf[0].size >= 8}
    for other, leaf in given.items():
        if leaf[0].size < 8:
            continue
        wanted = _signature(leaf, large)
        allowed = (1e-5 if large else 1e-3) * np.std(leaf.reshape(len(leaf), -1).astype(np.float64), axis=1)
        if before is not None:
            allowed = np.minimum(allowed, 0.1 * _distance(_signature(before[other], large), wanted))
        for name, own in signatures.items():
            same_size = student[name][0].size == leaf[0].size
            if same_size and np.any((_distance(own, wanted) <= allowed) & (allowed > 0)):
                yield name, other


def _signature(leaf: np.ndarray, large: bool) -> np.ndarray:
    """Numbers of each run that do not depend on order: sorted values or, if `large`, moments and extremes."""
    rows = leaf.reshape(len(leaf), -1).astype(np.float64)
    if not large:
        return np.sort(rows, axis=1)
    parts = [rows.mean(1), rows.std(1), np.abs(rows).mean(1), rows.min(1), rows.max(1)]
    return np.stack(parts, axis=1)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one - other).max(axis=1)
