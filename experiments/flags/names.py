"""What can be named: optimizers, decays, channels and their losses, initialisations, kinds of input, weights."""

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
    """From the rate to 0 along a line."""
    return optax.linear_schedule(rate, 0.0, steps)


OPTIMIZERS: dict[str, Rule] = {
    "adam": optax.adam,
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "sign": sign_descent,
}
# At which MNIST teachers read best, chosen by `mnist_factorial --preset rates_adam`, rates_sgd and rates_momentum.
REFERENCE_RATES = {"adam": 3e-3, "sgd": 0.1, "momentum": 0.1}
DECAYS: dict[str, Decay] = {"cosine": optax.cosine_decay_schedule, "linear": linear_decay}
# What a student is charged for on the logits that it sees: all channels that have a name.
LOSSES: Mapping[str, Callable[..., Channel]] = NAMED


def named_value(what: str, name: str, values: Mapping[str, T]) -> T:
    """The value of a name.

    Raises:
        InputError: unknown; says what there is.
    """
    if name not in values:
        raise InputError(f"{what} {name!r} is unknown; there are {', '.join(values)}")
    return values[name]


def checkpoint_path(name: str, *, weights: bool = True) -> Path:
    """The folder or GGUF file of a checkpoint: a path, weights that were fetched, or a model on the Hub.

    Raises:
        InputError: the weights were not fetched, says how; or as `resolve`.
    """
    path = Path(name)
    if name not in WEIGHTS or path.exists():
        return resolve(name, weights=weights)
    if not WEIGHTS[name].path.exists():
        command = " ".join((*PROGRAM, "weights", name))
        raise InputError(f"the weights of {name} are not at {WEIGHTS[name].path}: fetch them with {command}")
    return WEIGHTS[name].path
