from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.flags.names import DECAYS, OPTIMIZERS
from subliminal_theory.channel import SoftLogits, Subset
from subliminal_theory.divergence import ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, PerLayer, Perturbed, Shared
from subliminal_theory.study import FineTuned, Network, Optimizer, Run, Student, Untrained, identity, stacks
from subliminal_theory.study.run import Frozen, once, stacked, static
from subliminal_theory.vision.noise import NoiseImages

NOISE = NoiseImages((4, 4), 8)
STUDENT = Student(Subset(jnp.arange(5) > 2), NOISE, Optimizer(0.1), 3)
# What of a student is a number that one program takes as its argument, and what decides the program.
LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "rate": st.floats(1e-3, 1),
    "mask": st.lists(st.booleans(), min_size=5, max_size=5).filter(any),
    "amount": st.floats(0, 1),
    "temperature": st.floats(0.5, 2),
}
STATICS: dict[str, st.SearchStrategy[Any]] = {
    "rule": st.sampled_from([optax.adam, optax.sgd]),
    "clip": st.sampled_from([None, 1.0]),
    "decay": st.sampled_from([None, *DECAYS.values()]),
    "loss": st.sampled_from([SoftLogits, ReverseKL]),
    "policy": st.sampled_from([Perturbed, Interpolated]),
    "layers": st.booleans(),
    "law": st.sampled_from(["uniform", "blocks"]),
    "steps": st.integers(1, 2),
    "network": st.sampled_from([None, Network(), Network(width=3)]),
    "frozen": st.sampled_from([(), ("a",)]),
}
DEFAULTS: dict[str, Any] = {
    "rate": 0.1, "mask": [False, False, True, True, True], "amount": 0.5, "temperature": 1.0, "rule": optax.adam,
    "clip": None, "decay": None, "loss": SoftLogits, "policy": Perturbed, "layers": False, "law": "uniform",
    "steps": 1, "network": None, "frozen": (),
}  # fmt: skip


def student(**changes: Any) -> Student:
    v = {**DEFAULTS, **changes}
    start = v["policy"](v["amount"])
    return Student(
        Subset(np.array(v["mask"]), v["loss"](v["temperature"])),
        NoiseImages((4, 4), 8, law=v["law"]),
        Optimizer(v["rate"], v["rule"], v["decay"], clip=v["clip"]),
        v["steps"],
        PerLayer(("a", "*"), (Shared(), start)) if v["layers"] else start,
        network=v["network"],
        trains=Frozen(v["frozen"]),
    )


PROGRAMS = st.lists(st.fixed_dictionaries({}, optional=STATICS), min_size=1, max_size=3)
RUNS = st.lists(st.tuples(st.integers(0, 2), st.fixed_dictionaries({}, optional=LEAVES)), min_size=1, max_size=6)


@given(PROGRAMS, RUNS)
def test_stacks_are_the_runs_of_one_structure(programs: list[dict[str, Any]], drawn: list[Any]) -> None:
    """Two runs share a stack exactly where all that is static agrees, whatever their numbers are."""
    chosen = [(programs[which % len(programs)], numbers) for which, numbers in drawn]
    runs = {place: Run(Untrained(), student(**own, **numbers)) for place, (own, numbers) in enumerate(chosen)}
    expected: dict[str, list[int]] = {}
    for place, (own, _) in enumerate(chosen):
        expected.setdefault(repr({**DEFAULTS, **own}), []).append(place)
    assert stacks(runs) == list(expected.values())
    for group in stacks(runs):
        stacked([runs[place] for place in group])


@pytest.mark.parametrize("name", [*LEAVES, *STATICS])
@given(data=st.data())
def test_each_axis(name: str, data: st.DataObject) -> None:
    """An axis that is a leaf does not split a stack, one that is static does."""
    value = data.draw({**LEAVES, **STATICS}[name].filter(lambda value: value != DEFAULTS[name]))
    runs = {"one": student(), "other": student(**{name: value})}
    assert len(stacks(runs)) == (1 if name in LEAVES else 2)


def test_shapes_and_dtypes_split_a_stack() -> None:
    wide, half = Subset(np.ones(6, bool)), replace(STUDENT, optimizer=Optimizer(jnp.float16(0.1)))
    runs = {"one": STUDENT, "wide": replace(STUDENT, channel=wide), "half": half, "two": once(STUDENT)}
    assert stacks(runs) == [["one"], ["wide"], ["half"], ["two"]]


def test_an_axis_of_ones_own() -> None:
    """A field that a user adds is a leaf; `static` makes it decide."""

    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Own:
        student: Student
        warmth: Any = 1.0
        mood: str = static(default="calm")

    runs = {"one": Own(STUDENT), "warm": Own(STUDENT, 2.0), "wild": Own(STUDENT, 2.0, "wild")}
    assert stacks(runs) == [["one", "warm"], ["wild"]]


@given(st.lists(st.fixed_dictionaries({}, optional={**LEAVES, **STATICS}), min_size=2, max_size=2))
def test_identity_is_equality(drawn: list[dict[str, Any]]) -> None:
    one, other = (student(**changes) for changes in drawn)
    words = [repr({**DEFAULTS, **changes}) for changes in drawn]
    assert (identity(one) == identity(other)) == (words[0] == words[1])
    assert hash(identity(one)) == hash(identity(student(**drawn[0])))


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    """Unless the rate falls, when it depends on where the run ends."""
    falling = replace(STUDENT, optimizer=Optimizer(0.1, decay=optax.cosine_decay_schedule))
    for one, same in ((STUDENT, True), (falling, False)):
        assert (identity(once(one)) == identity(once(replace(one, steps=5)))) == same


@pytest.mark.parametrize("decay", [None, *DECAYS])
@pytest.mark.parametrize("warmup", [0, 2])
def test_rates_of_a_run(decay: str | None, warmup: int) -> None:
    """From 0 up to the rate, then down along the decay; without a decay constant."""
    steps, rate = 10, 0.5
    optimizer = Optimizer(rate, optax.sgd, None if decay is None else DECAYS[decay], warmup).transformation(steps)
    state, taken = optimizer.init(jnp.ones(())), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(()), state)
        taken.append(-float(update))
    part = np.clip((np.arange(steps) - warmup) / (steps - warmup), 0, 1)
    falls = {None: np.ones(steps), "linear": 1 - part, "cosine": (1 + np.cos(np.pi * part)) / 2}[decay]
    rises = np.ones(steps) if decay is None or not warmup else np.minimum(np.arange(steps) / warmup, 1)
    np.testing.assert_allclose(taken, rate * rises * falls, atol=1e-6)


def test_gradients_are_clipped_to_a_norm() -> None:
    optimizer = Optimizer(1.0, optax.sgd, clip=0.5).transformation(1)
    for gradient, expected in (([3.0, 4.0], [-0.3, -0.4]), ([0.03, 0.04], [-0.03, -0.04])):
        update, _ = optimizer.update(jnp.array(gradient), optimizer.init(jnp.zeros(2)))
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_named_optimizers() -> None:
    """Two steps written out; Adam as published: 0.9, 0.999, 1e-8, corrected for bias."""
    gradients, rate = np.array([[0.5, -2.0, 1e-3], [-0.25, -2.0, 1e-3]]), 3e-4
    first, second, speed = np.zeros(3), np.zeros(3), np.zeros(3)
    states = {name: rule(rate).init(jnp.zeros(3)) for name, rule in OPTIMIZERS.items()}
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        speed = 0.9 * speed + gradient
        corrected = first / (1 - 0.9**step), second / (1 - 0.999**step)
        expected = {
            "adam": corrected[0] / (np.sqrt(corrected[1]) + 1e-8), "sgd": gradient, "momentum": speed,
            "sign": np.sign(gradient),
        }  # fmt: skip
        for name, direction in expected.items():
            update, states[name] = OPTIMIZERS[name](rate).update(jnp.asarray(gradient, jnp.float32), states[name])
            np.testing.assert_allclose(update, -rate * direction, rtol=1e-4)


def test_values_say_what_they_are() -> None:
    run = Run(FineTuned(Optimizer(0.1), 2, "lessons"), replace(STUDENT, start=Fresh(), other=3))
    assert run == Run(FineTuned(Optimizer(0.1), 2, "lessons"), run.student)
    assert jax.tree.leaves(run.teacher) == [0.1]
    with pytest.raises(InputError, match="PerLayer"):
        PerLayer(("a", "b"), (Shared(),))
