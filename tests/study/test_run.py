from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.flags.names import DECAYS, OPTIMIZERS
from subliminal_theory.channel import SoftLogits, Subset
from subliminal_theory.divergence import ReverseKL
from subliminal_theory.inits import Interpolated, PerLayer, Perturbed, Shared
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.study import Network, Optimizer, Run, Student, Untrained, identity, stacks
from subliminal_theory.study.run import Frozen, once, stacked, static
from subliminal_theory.vision.noise import NoiseImages

STUDENT = Student(Subset(jnp.arange(5) > 2), NoiseImages((4, 4), 8), Optimizer(0.1), 3)
# What of a student is a number that one program takes as its argument, and what decides the program; its default.
LEAVES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "rate": (0.1, st.floats(1e-3, 1)),
    "mask": ([False, False, True, True, True], st.lists(st.booleans(), min_size=5, max_size=5).filter(any)),
    "amount": (0.5, st.floats(0, 1)),
    "temperature": (1.0, st.floats(0.5, 2)),
}
STATICS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "rule": (optax.adam, st.sampled_from([optax.adam, optax.sgd])),
    "clip": (None, st.sampled_from([None, 1.0])),
    "decay": (None, st.sampled_from([None, *DECAYS.values()])),
    "loss": (SoftLogits, st.sampled_from([SoftLogits, ReverseKL])),
    "policy": (Perturbed, st.sampled_from([Perturbed, Interpolated])),
    "layers": (False, st.booleans()),
    "law": ("uniform", st.sampled_from(["uniform", "blocks"])),
    "steps": (1, st.integers(1, 2)),
    "network": (None, st.sampled_from([None, Network(), Network(width=3)])),
    "frozen": ((), st.sampled_from([(), ("a",)])),
}
AXES = {**LEAVES, **STATICS}


def some(axes: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: drawn for name, (_, drawn) in axes.items()})


def full(changes: dict[str, Any]) -> dict[str, Any]:
    return {**{name: default for name, (default, _) in AXES.items()}, **changes}


def student(**changes: Any) -> Student:
    v = full(changes)
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


@pytest.mark.slow
@given(
    st.lists(some(STATICS), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), some(LEAVES)), min_size=1, max_size=6),
)
def test_stacks_are_the_runs_of_one_structure(programs: list[dict[str, Any]], drawn: list[Any]) -> None:
    """Two runs share a stack exactly where all that is static agrees, whatever their numbers are."""
    chosen = [(programs[which % len(programs)], numbers) for which, numbers in drawn]
    runs = {place: Run(Untrained(), student(**own, **numbers)) for place, (own, numbers) in enumerate(chosen)}
    expected: dict[str, list[int]] = {}
    for place, (own, _) in enumerate(chosen):
        expected.setdefault(repr(full(own)), []).append(place)
    assert stacks(runs) == list(expected.values())
    for group in stacks(runs):
        stacked([runs[place] for place in group])


@pytest.mark.slow
@pytest.mark.parametrize("name", AXES)
@given(data=st.data())
def test_each_axis(name: str, data: st.DataObject) -> None:
    """An axis that is a leaf does not split a stack, one that is static does."""
    default, drawn = AXES[name]
    value = data.draw(drawn.filter(lambda value: value != default))
    assert len(stacks({"one": student(), "other": student(**{name: value})})) == (1 if name in LEAVES else 2)


def test_axes_of_ones_own() -> None:
    """A field that a user adds is a leaf; `static` makes it decide. So do shapes and dtypes."""

    @register_dataclass
    @dataclass(frozen=True)
    class Own:
        student: Student
        warmth: Any = 1.0
        mood: str = static(default="calm")

    wide = replace(STUDENT, channel=Subset(np.ones(6, bool)))
    half = replace(STUDENT, optimizer=Optimizer(jnp.float16(0.1)))
    runs = {"one": Own(STUDENT), "warm": Own(STUDENT, 2.0), "wild": Own(STUDENT, 2.0, "wild"), "wide": Own(wide)}
    assert stacks({**runs, "half": Own(half)}) == [["one", "warm"], ["wild"], ["wide"], ["half"]]


@pytest.mark.slow
@given(some(AXES), some(AXES))
def test_identity_is_equality(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = repr(full(one)) == repr(full(other))
    assert (identity(student(**one)) == identity(student(**other))) == same
    assert hash(identity(student(**one))) == hash(identity(student(**one)))


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    """Unless the rate falls, when it depends on where the run ends."""
    falling = replace(STUDENT, optimizer=Optimizer(0.1, decay=optax.cosine_decay_schedule))
    for one, same in ((STUDENT, True), (falling, False)):
        assert (identity(once(one)) == identity(once(replace(one, steps=5)))) == same


def taken(optimizer: Optimizer, gradients: Any) -> np.ndarray:
    """The updates that it makes of gradients, one a step."""
    rule, found = optimizer.transformation(len(gradients)), []
    state = rule.init(jnp.zeros_like(gradients[0]))
    for gradient in gradients:
        update, state = rule.update(gradient, state)
        found.append(update)
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, *DECAYS])
@pytest.mark.parametrize("warmup", [0, 2])
def test_rates_of_a_run(decay: str | None, warmup: int) -> None:
    """From 0 up to the rate, then down along the decay; without a decay constant."""
    step = np.arange(10)
    part = np.clip((step - warmup) / (10 - warmup), 0, 1)
    falls = {None: np.ones(10), "linear": 1 - part, "cosine": (1 + np.cos(np.pi * part)) / 2}[decay]
    rises = np.minimum(step / warmup, 1) if decay and warmup else 1
    found = taken(Optimizer(0.5, optax.sgd, None if decay is None else DECAYS[decay], warmup), jnp.ones(10))
    np.testing.assert_allclose(-found, 0.5 * rises * falls, atol=1e-6)


@pytest.mark.slow
def test_gradients_are_clipped_to_a_norm() -> None:
    found = taken(Optimizer(1.0, optax.sgd, clip=0.5), jnp.array([[3.0, 4.0], [0.03, 0.04]]))
    np.testing.assert_allclose(found, [[-0.3, -0.4], [-0.03, -0.04]], rtol=1e-6)


@pytest.mark.slow
def test_named_optimizers() -> None:
    """Two steps written out; Adam as published: 0.9, 0.999, 1e-8, corrected for bias."""
    first, second = np.array([0.5, -2.0, 1e-3]), np.array([-0.25, -2.0, 1e-3])
    means = 0.1 * first / 0.1, (0.09 * first + 0.1 * second) / 0.19
    squares = first**2, (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    expected = {
        "adam": [m / (np.sqrt(v) + 1e-8) for m, v in zip(means, squares, strict=True)],
        "sgd": [first, second],
        "momentum": [first, 0.9 * first + second],
        "sign": [np.sign(first), np.sign(second)],
    }
    for name, rule in OPTIMIZERS.items():
        found = taken(Optimizer(3e-4, rule), jnp.array([first, second]))
        np.testing.assert_allclose(found, -3e-4 * np.array(expected[name]), rtol=1e-4)
