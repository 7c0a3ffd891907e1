"""Names on the command line: optimizers, decays of the learning rate, losses, and weights."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import optax

from subliminal_theory.channel import Channel
from subliminal_theory.divergence import NAMED
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.download import resolve
from subliminal_theory.language.hub.weights import WEIGHTS
from subliminal_theory.study.run import Decay, Rule

from ..app.contract import PROGRAM

T = TypeVar("T")


def sign_descent(rate: Any) -> optax.GradientTransformation:
    """theta <- theta - rate sign(gradient)."""
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(rate))


def linear_decay(rate: Any, steps: int) -> optax.Schedule:
    """A learning rate that falls linearly to 0."""
    return optax.linear_schedule(rate, 0.0, steps)


OPTIMIZERS: dict[str, Rule] = {
    "adam": optax.adam,
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "sign": sign_descent,
}
# The rates with the best MNIST teachers, from `mnist_factorial --preset rates_adam`, rates_sgd and rates_momentum.
REFERENCE_RATES = {"adam": 3e-3, "sgd": 0.1, "momentum": 0.1}
DECAYS: dict[str, Decay] = {"cosine": optax.cosine_decay_schedule, "linear": linear_decay}
# The losses of students on the logits that they see: all named channels.
LOSSES: Mapping[str, Callable[..., Channel]] = NAMED


def named_value(what: str, name: str, values: Mapping[str, T]) -> T:
    """The value of a name.

    Raises:
        InputError: the name is unknown; lists the known names.
    """
    if name not in values:
        raise InputError(f"{what} {name!r} is unknown; there are {', '.join(values)}")
    return values[name]


def checkpoint_path(name: str, *, weights: bool = True) -> Path:
    """The folder or GGUF file of a checkpoint. `name` is a path, fetched weights, or a model on the Hub.

    Raises:
        InputError: the weights were not fetched (the message says how to); or as for `resolve`.
    """
    path = Path(name)
    if name not in WEIGHTS or path.exists():
        return resolve(name, weights=weights)
    if not WEIGHTS[name].path.exists():
        command = " ".join((*PROGRAM, "weights", name))
        raise InputError(f"the weights of {name} are not at {WEIGHTS[name].path}: fetch them with {command}")
    return WEIGHTS[name].path
