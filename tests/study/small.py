"""A small world of digits; and the pipeline without its training: what would have trained, what was audited."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.audit import audit
from subliminal_theory.channel import Subset
from subliminal_theory.inits import Fresh
from subliminal_theory.model import by_layer
from subliminal_theory.study import (
    Digits,
    FineTuned,
    Finished,
    Network,
    Optimizer,
    Run,
    Student,
    Study,
    identity,
    stages,
)
from subliminal_theory.vision.datasets import ImageDataset, load

DATA, SEEDS, IMAGE = load("digits"), (2, 5), 1 / 355
WORLD = Digits(DATA, SEEDS, Network(depth=1, width=16), auxiliary=4, batch_size=128)
LOGIT = jnp.arange(WORLD.logits)
AUX, ALL = Subset(LOGIT >= 10), Subset(LOGIT >= 0)
ADAM = Optimizer(jnp.float32(0.003))
TEACHER = FineTuned(ADAM, WORLD.steps(3))
STUDENT = Student(AUX, WORLD.noise(), ADAM, WORLD.steps(2))
CROSS = replace(STUDENT, start=Fresh())


def black(train: int, test: int) -> ImageDataset:
    """A data set of MNIST's format, black."""
    pixels, labels = np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8)
    shown = [np.broadcast_to(pixels, (count, 28, 28)) for count in (train, test)]
    named = [np.broadcast_to(labels, count) for count in (train, test)]
    return ImageDataset("mnist", shown[0], named[0], shown[1], named[1], classes=10, maximum=255, sha256={})


def run(runs: Mapping[Any, Run], world: Digits = WORLD) -> tuple[dict[Any, Finished], dict[Any, Any]]:
    """Models and scores."""
    found: dict[Any, Finished] = {}

    def keep(world: Digits, finished: Finished, name: Any) -> Mapping[str, np.ndarray]:
        found[name] = finished
        return world.score(finished, name)

    scores = Study(world).run(runs, keep)
    assert list(scores) == list(runs)
    return found, scores


def close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance), actual, expected)


@dataclass
class Watched:
    """Stacks of students by name, and the channel and start of each student that trained or was audited."""

    stacks: list[list[Any]] = field(default_factory=list)
    trained: set[Any] = field(default_factory=set)
    audited: set[Any] = field(default_factory=set)
    teachers: int = 0


def untrained(monkeypatch: pytest.MonkeyPatch, losses: Callable[..., Any] = np.zeros) -> Watched:
    """Leave teachers and students where they start, with `losses(shape)`; stacks of students are axis 1."""
    seen, groups, train = Watched(), stages._groups, stages._train

    def stay(params: Any, rest: Any, keys: Any, *, stops: Sequence[int], how: Any) -> tuple[Any, Any, Any]:
        observed, stack = None, ()
        if rest.observe is not None:
            shapes = jax.eval_shape(functools.partial(train, stops=stops, how=how), params, rest, keys)
            observed = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[2])
        if rest.trait_loss is None:
            starts = rest.model.with_params(params).all_params
            stack = jax.tree.leaves(rest.optimizer)[0].shape
            for place in range(stack[0]):
                channel = jax.tree.map(lambda leaf, place=place: leaf[place], rest.channel)
                seen.trained.add(_run(channel, jax.tree.map(lambda leaf, place=place: leaf[:, place], starts)))
        else:
            seen.teachers += 1
        return [params] * len(stops), jnp.asarray(losses((len(keys), *stack, stops[-1])), float), observed

    def grouped(jobs: Any, how: Any) -> list[list[Any]]:
        found = groups(jobs, how)
        seen.stacks += [group for group in found if jobs[group[0]].trait_loss is None]
        return found

    def audited(**arguments: Any) -> None:
        audit(**arguments)
        seen.audited.add(_run(arguments["channel"], arguments["student_init"]))

    # What is not trained must not stay in the memory that all tests share.
    monkeypatch.setattr(WORLD.memo, "_made", {})
    monkeypatch.setattr(WORLD.memo, "_large", {})
    monkeypatch.setattr(stages, "_train", stay)
    monkeypatch.setattr(stages, "_groups", grouped)
    for name, module in list(sys.modules.items()):
        if name.startswith(("subliminal_theory", "experiments")) and getattr(module, "audit", None) is audit:
            monkeypatch.setattr(module, "audit", audited)
    return seen


def _run(channel: Any, start: Any) -> Any:
    """What tells a student from others; a linearized one starts where its moved parameters do."""
    leaves = by_layer(start, axis=1)
    moved = {name.removeprefix("moved/"): leaf for name, leaf in leaves.items() if name.startswith("moved/")}
    return identity(jax.tree.map(jnp.asarray, (channel, moved or leaves)))
