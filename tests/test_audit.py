from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.audit import (
    audit,
    refuse_fixed_points,
    refuse_other_objectives,
    refuse_trained_weights,
    require_same_template,
)
from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset
from subliminal_theory.errors import InputError
from subliminal_theory.source import Batch

RUNS, LOGITS = 3, 5
RNG = np.random.default_rng(0)


def draw():
    """Three runs of a network; its biases start at 0."""
    return {"kernel": RNG.normal(size=(RUNS, 4, LOGITS)), "bias": np.zeros((RUNS, LOGITS))}


TEACHER_INIT, OTHER_INIT = draw(), draw()
TEACHER = jax.tree.map(lambda leaf: leaf + 0.1 * RNG.normal(size=leaf.shape), TEACHER_INIT)
BATCH = Batch(np.zeros((8, 4)), np.ones(8))


def good(**changes):
    """A proper set-up with changes."""
    return {
        "student_init": TEACHER_INIT,
        "teacher_init": TEACHER_INIT,
        "teacher": TEACHER,
        "channel": Subset((3, 4)),
        "logits": LOGITS,
        "batch": BATCH,
        "private": (0, 1, 2),
        **changes,
    }


@dataclass(frozen=True)
class WithLabel(SoftLogits):
    """Charges for a label too."""

    def loss(self, student_logits, targets, where=None):
        label = -jax.nn.log_softmax(student_logits)[..., 0]
        return super().loss(student_logits, targets, where) + 0.01 * label


@dataclass(frozen=True)
class ToSomethingElse(SquaredError):
    """Squared error against the teacher's probabilities."""

    def targets(self, key, teacher_logits, where=None):
        return jax.nn.softmax(teacher_logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"private": ()},
        {"student_init": OTHER_INIT},
        {"student_init": OTHER_INIT, "cross_init": True},
        {"student_init": jax.tree.map(lambda leaf: np.roll(leaf, 1, 0), TEACHER_INIT), "cross_init": True},
        {"student_init": {"kernel": np.zeros((RUNS, 4, 9)), "bias": np.zeros((RUNS, 9))}},
        {"teacher": {**TEACHER, "bias": TEACHER_INIT["bias"]}},  # the teacher's bias was not trained
        {"channel": SoftLogits(0.5), "private": ()},
        {"channel": SquaredError(), "private": ()},
        {"channel": SquaredError([0, 0, 0, 1, 2])},
        {"channel": Subset(np.arange(LOGITS) > 2, Subset((2, 3), SquaredError()))},
        {"channel": Subset((3, 4), SampledToken())},
        {"channel": Subset((3, 4), SampledToken(0.0))},
    ],
)
def test_good_set_ups_pass(changes) -> None:
    audit(**good(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student_init": TEACHER},
            "the student starts from the TRAINED teacher's bias: start it from the teacher's",
        ),
        (
            {"student_init": {**TEACHER_INIT, "kernel": TEACHER["kernel"]}},
            "the student starts from the TRAINED teacher's kernel: start it from the teacher's initialisation",
        ),
        (
            {"student_init": {**OTHER_INIT, "kernel": TEACHER["kernel"]}, "cross_init": True},
            "the student starts from the TRAINED teacher's kernel",
        ),
        (
            {"batch": Batch(BATCH.inputs, BATCH.weights, labels=np.zeros(8, int))},
            "the student's batches carry labels: use a source without them",
        ),
        (
            {"channel": WithLabel(), "private": ()},
            r"the student's loss has gradient 0\.0\d+ where it already equals",
        ),
        (
            {"channel": Subset((0, 3, 4), WithLabel()), "private": ()},
            r"the student's loss has gradient 0\.0\d+ where",
        ),
        (
            {"channel": ToSomethingElse(), "private": ()},
            r"the student's loss has gradient [\d.]+ where it already eq",
        ),
        ({"private": (2, 3)}, "the channel shows logit 3, in which the trait itself is read"),
        ({"channel": SoftLogits()}, "the channel shows logit 0, in which the trait itself is read"),
        (
            {"channel": SquaredError([0, 1, 0, 1, 1])},
            "the channel shows logit 1, in which the trait itself is read",
        ),
        (
            {"channel": Subset((2, 4), SampledToken())},
            "the channel shows logit 2, in which the trait itself is read",
        ),
        (
            {"cross_init": True},
            r"cross-init control with fixed points: runs \[0, 1, 2\] start at their own teacher's",
        ),
        ({"channel": Subset((3, 5))}, r"Subset: logit index 5 is outside 0\.\.4"),
    ],
)
def test_bad_set_ups_are_refused(changes, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        audit(**good(**changes))


def test_fixed_points_are_named() -> None:
    student = jax.tree.map(lambda leaf: leaf.copy(), OTHER_INIT)
    student["kernel"][1] = TEACHER_INIT["kernel"][1]
    message = r"^cross-init control with fixed points: runs \[1\] start at their own teacher's initialisation; "
    with pytest.raises(InputError, match=message):
        refuse_fixed_points(student, TEACHER_INIT)
    student["kernel"][1, 0, 0] += 1
    refuse_fixed_points(student, TEACHER_INIT)


def test_trained_weights_without_runs() -> None:
    init, trained = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (TEACHER_INIT, TEACHER))
    refuse_trained_weights(init, init, trained)
    refuse_trained_weights(jax.tree.map(jnp.asarray, init), init, init)  # a teacher that has learnt nothing
    nested = [{"layers": [{"w": tree["kernel"]}]} for tree in (trained, init, trained)]
    with pytest.raises(InputError, match="TRAINED teacher's layers/0/w"):
        refuse_trained_weights(*nested)


def test_other_objectives_at_any_temperature() -> None:
    for temperature in (0.05, 1.0, 50.0):
        refuse_other_objectives(SoftLogits(temperature), 13)
        refuse_other_objectives(Subset((10, 11, 12), SoftLogits(temperature)), 13)
    with pytest.raises(InputError, match=r"charges for something else than imitation \(a label, a feat"):
        refuse_other_objectives(WithLabel(), 13)


def test_templates() -> None:
    require_same_template(teacher="x/255", student="x/255", evaluation="x/255")
    require_same_template(teacher="x/255")
    with pytest.raises(InputError, match=r"^teacher uses template 'x/255' but evaluation uses 'x/127\.5 - 1'$"):
        require_same_template(teacher="x/255", student="x/255", evaluation="x/127.5 - 1")


def test_one_leaking_run_of_an_ensemble_is_enough() -> None:
    leaking = {**TEACHER_INIT, "kernel": TEACHER_INIT["kernel"].copy()}
    leaking["kernel"][1] = TEACHER["kernel"][1]
    with pytest.raises(InputError, match="TRAINED teacher's kernel"):
        refuse_trained_weights(leaking, TEACHER_INIT, TEACHER)
