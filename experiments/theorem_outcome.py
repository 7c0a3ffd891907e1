"""From theorem to outcome: does a number from before the training predict how much a student learns, run by run?

One family of digit students: m, noise on the start, width and optimizer in all combinations. Before a student
trains, its `PREDICTORS` are computed, without a Jacobian. Its outcome is its accuracy; the fall of its trait loss
is reported too.

Decided before any run of the seeds below 1000. The levels were chosen on seeds from 1000 on, so that accuracies
spread, and the code was tried there.

* Primary predictor: `tangent`. Theorem 1 speaks of a small step, `contraction` of small displacements and gradient
  descent, coverage of the first update. Only the tangent student has everything that the design varies (start,
  channel, the very batches, the optimizer, the number of steps, a teacher of finite distance), and it is exact
  where the network is linear in its parameters. It never trains the network. All others are secondary.
* Model: the outcome rises with each predictor, as theory says. A rising step function (isotonic regression) is
  fitted on half of the seeds and judged on the other half, both ways. n* = 1.92 / KL is the same predictor as KL.
* Trivial predictors: the mean of all runs, and the mean of the run's cell of the design, both of the fitted half.
* A predictor tells something of a run if it lowers the squared error of the cells' means when it is added to
  them, with one slope for all cells: the interval (95%, bootstrap over seeds) must be above 0.
* It tells something of a new setting if, fitted on other seeds and without the run's level of an axis, it lowers
  the squared error of the mean over the other levels of that axis, all else being equal; an interval likewise.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from subliminal_theory.channel import Subset
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Digits, FineTuned, Study, finite
from subliminal_theory.study.digits import Scale
from subliminal_theory.study.reading import model_of_run

from .app.contract import Part, listed, option
from .app.figures import COLORS, panels
from .flags.digits import EMBEDDED_DIGITS, SMOKE, Setting, TrainingConfig, configure_sweep
from .flags.names import OPTIMIZERS, named_value
from .mnist_alignment import TRAIT_IMAGES, finished, jobs
from .predictors import Case, predict, trait_loss

PREDICTORS = {
    "tangent": "accuracy of the tangent student",
    "contraction": "contraction product, fall of the trait loss",
    "top": "share of $D_T$ on learnable eigenvectors",
    "first_step": "first step, $D_S \\cdot (-g)$",
    "signal": "$A = g^T G g$",
    "cos_metric": "$\\cos_M(f_T - f, -J g)$",
    "coverage": "coverage",
    "kl": "KL(teacher || base) per input",
}
PRIMARY, KNOWN = "tangent", "coverage"
OUTCOMES = {"accuracy": "test accuracy", "fall": "fall of the trait loss"}
AXES = {"amount": "noise on the start", "aux": "m", "width": "width", "optimizer": "optimizer"}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """The levels of the design."""

    seeds: int = option(12, "number of independent runs", minimum=2)
    aux: int = option(50, "auxiliary logits of the networks", minimum=1)
    counts: str = option("5,15,50", "values of m, up to --aux")
    amounts: str = option("0,0.15,0.3,0.5", "noise on the initialization, in units of each layer's own scale")
    widths: str = option("64,128", "neurons of each hidden layer")
    rates: str = option("sgd:1,adam:6e-4", "optimizers of the students and their rates")


PRESETS = {
    "full": Config(**EMBEDDED_DIGITS),
    "smoke": Config(**{**SMOKE, "seeds": 2}, counts="5,50", amounts="0,0.3", widths="32", rates="sgd:1"),
}


def configure(preset: str | None, changes: dict[str, Any]) -> Config:
    """As the other digit experiments, with digits as the data and full the preset."""
    found = configure_sweep(PRESETS, preset, changes)
    assert isinstance(found, Config)
    return found


def plan(config: Config) -> list[Part]:
    """One part for each width and chunk of seeds."""
    levels = [listed(config.counts, "--counts"), listed(config.amounts, "--amounts", float)]
    rates, parts = optimizers(config.rates), list[Part]()
    for width in listed(config.widths, "--widths"):
        settings = [
            config.setting(width=width, start="perturbed", shown=m, amount=amount, student_optimizer=name,
                           student_rate=rate)
            for m, amount, (name, rate) in itertools.product(*levels, rates.items())
        ]  # fmt: skip
        parts += config.chunks(functools.partial(run, config, settings), f"width-{width}-")
    return parts


def optimizers(text: str) -> dict[str, float]:
    """The rate of each optimizer in a list such as "sgd:1,adam:6e-4".

    Raises:
        InputError: an optimizer is unknown, named twice or without a positive rate.
    """
    found: dict[str, float] = {}
    for entry in listed(text, "--rates", str):
        name, _, rate = entry.partition(":")
        named_value("optimizer", name, OPTIMIZERS)
        if name in found or not rate:
            raise InputError(f"--rates takes every optimizer once, with its rate, as in sgd:1, got {text!r}")
        (found[name],) = listed(rate, f"--rates {name}:", float)
    return found


def run(config: Config, settings: Sequence[Setting], seeds: Sequence[int]) -> list[Row]:
    """The predictors and outcomes of all students of one width, for some seeds."""
    world = settings[0].world(seeds, config.data_dir)
    study, teacher = Study(world), settings[0].run(world).teacher
    assert isinstance(teacher, FineTuned)
    images = Scale(world.data.maximum)(jnp.asarray(world.data.train_images[:TRAIT_IMAGES]))
    taught = images, jnp.asarray(world.data.train_labels[:TRAIT_IMAGES].astype(np.int32))
    found = [before(study, teacher, setting, taught) for setting in settings]
    for name, linear in (("tangent", True), ("accuracy", False)):
        for place, result in finished(world, jobs(study, teacher, settings, linear)):
            told = found[place]
            told[name] = world.accuracy(finite(result, world.names).model)
            if not linear:
                told["fall"] = told["start_loss"] - losses(world.data.classes, result.model, taught)
    return [
        {"condition": "student", "width": setting.width, "aux": setting.shown, "amount": setting.amount,
         "optimizer": setting.student_optimizer, **own, "metric": metric, "value": float(told[metric][place])}
        for setting, told in zip(settings, found, strict=True)
        for place, own in enumerate(world.labels)
        for metric in (*PREDICTORS, *OUTCOMES)
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnames="classes")
def losses(classes: int, models: Model, taught: tuple[Array, Array]) -> Float[Array, " runs"]:
    """The trait loss of every run."""
    return jax.vmap(lambda model: trait_loss(classes, model, taught))(models)


def before(
    study: Study, teacher: FineTuned, setting: Setting, taught: tuple[Array, Array]
) -> dict[str, Float[np.ndarray, " runs"]]:
    """What `predict` says of a setting's students."""
    world = study.world
    assert isinstance(world, Digits)
    student = setting.student(world)
    assert isinstance(student.channel, Subset)
    models = world.initial(), world.start(student), study.teacher(teacher)
    rate = student.optimizer.rate if setting.student_optimizer == "sgd" else jnp.float32(jnp.inf)
    found = []
    for place, key in enumerate(world.keys("students")):
        base, start, own = (model_of_run(model, place) for model in models)
        case = Case(
            base.params, start, own, taught, student.channel, student.source, student.optimizer, world.data.classes
        )
        found.append(jax.device_get(predict(case, student.steps, rate, key)))
    return {name: np.array([told[name] for told in found]) for name in found[0]}


def report(results: Results, config: Config) -> str:
    """The number of runs."""
    return f"{len(results.values(metric='accuracy'))} runs"


def plot(results: Results, config: Config) -> Figure:
    """The accuracy against the primary predictor."""
    figure, ((axes,),) = panels()
    axes.plot(results.values(metric=PRIMARY), results.values(metric="accuracy"), ".", color=COLORS[0])
    return figure
