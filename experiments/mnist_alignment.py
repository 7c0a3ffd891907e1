"""What carries the trait during a whole run, and can transfer be predicted before the student is trained?

Students start from more and more perturbed initializations. At every step, two cosines are measured: between the
student's and the trait's gradient, and between the student's and the teacher's displacement. Coverage, the cosine
between the FIRST update and the teacher's displacement, is compared with the final accuracy (arXiv 2606.22019
reports a Spearman correlation of about .95). For each m, the linearized student (empirical tangent kernel) is
compared with the real one.

In the figure: the cosines along the run; accuracy against coverage, one dot per student; the accuracy of
linearized and real students, one dot per pair. Small cosines are expected: only their sign is predicted, and it
adds up.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from matplotlib.figure import Figure
from scipy import stats

from subliminal_theory.alignment import follow, linearised
from subliminal_theory.distill import Step
from subliminal_theory.model import Model
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Digits, FineTuned, Job, Study, finite, labels, rows, trained
from subliminal_theory.study.digits import Scale
from subliminal_theory.study.stages import Result
from subliminal_theory.vision.datasets import ImageDataset

from .app.contract import Part, listed, option
from .app.figures import COLORS, note, panels, runs_against
from .flags.digits import EMBEDDED_DIGITS, SMOKE, Setting, TrainingConfig, configure_sweep
from .predictors import trait_loss

# The trait's gradient is measured on this many digits.
TRAIT_IMAGES = 1000
COSINES = ("gradient", "update", "displacement")
PAIR = ("coverage", "test_accuracy")


@dataclass(frozen=True)
class Config(TrainingConfig):
    """The perturbations and channels."""

    seeds: int = option(10, "number of independent runs", minimum=1)
    aux: int = option(10, "m of the perturbed students", minimum=1)
    amounts: str = option(
        "0,0.05,0.1,0.2,0.4,0.8", "noise on the initialization, in units of each layer's own scale"
    )
    counts: str = option("2,3,5,10", "values of m for linearized students, up to --aux")
    points: int = option(25, "number of steps of a run to store", minimum=2)


PRESETS = {
    "released": Config(),
    "digits": Config(aux=50, counts="3,10,50", **EMBEDDED_DIGITS),
    "smoke": Config(aux=50, counts="3,50", amounts="0,0.4", **SMOKE),
}
configure = functools.partial(configure_sweep, PRESETS)


def plan(config: Config) -> list[Part]:
    """One part for each chunk of seeds."""
    amounts, counts = listed(config.amounts, "--amounts", float), listed(config.counts, "--counts")
    perturbed = [config.setting(start="perturbed", amount=amount) for amount in amounts]
    narrowed = [config.setting(shown=m) for m in counts]
    return config.chunks(functools.partial(run, config, perturbed, narrowed))


def run(
    config: Config, perturbed: Sequence[Setting], narrowed: Sequence[Setting], seeds: Sequence[int]
) -> list[Row]:
    """The result rows of the perturbed and the linearized students, for some seeds."""
    world = perturbed[0].world(seeds, config.data_dir)
    study, teacher = Study(world), perturbed[0].run(world).teacher
    assert isinstance(teacher, FineTuned)
    return followed_rows(study, teacher, perturbed, config.points) + linearised_rows(study, teacher, narrowed)


@register_dataclass
@dataclass(frozen=True)
class Follow:
    """An observer that compares a student with its teacher, which started from `start`."""

    start: PyTree
    teacher: PyTree
    trait: Callable[[Model], Array] = field(metadata={"static": True})

    def __call__(self, step: Step) -> PyTree:
        trait_gradient = jax.grad(lambda params: self.trait(step.model.with_params(params)))
        return follow(trait_gradient, self.start, self.teacher)(step)


@dataclass(frozen=True)
class Trait:
    """The trait loss on the first training images."""

    data: ImageDataset

    def __call__(self, model: Model) -> Array:
        return trait_loss(self.data.classes, model, taught_images(self.data))


def taught_images(data: ImageDataset) -> tuple[Array, Array]:
    """The first training images, scaled, and their labels."""
    images = Scale(data.maximum)(jnp.asarray(data.train_images[:TRAIT_IMAGES]))
    return images, jnp.asarray(data.train_labels[:TRAIT_IMAGES].astype(np.int32))


def jobs(
    study: Study, teacher: FineTuned, settings: Sequence[Setting], linear: bool = False, observe: bool = False
) -> dict[int, Job]:
    """The jobs of the students of some settings, by their index."""
    world, taught, found = study.world, study.teacher(teacher), dict[int, Job]()
    assert isinstance(world, Digits)
    follower = Follow(world.initial().params, taught.params, Trait(world.data)) if observe else None
    for place, setting in enumerate(settings):
        student = setting.student(world)
        start = world.start(student)
        study.audit(student, start, teacher)
        model = linearised(start) if linear else start
        found[place] = Job(
            model, student.source, student.optimizer, student.steps, taught, student.channel, observe=follower
        )
    return found


def followed_rows(study: Study, teacher: FineTuned, settings: Sequence[Setting], points: int) -> list[Row]:
    """The accuracy, coverage and cosines of perturbed students."""
    world, found = study.world, dict[int, list[Row]]()
    assert isinstance(world, Digits)
    for place, result in finished(world, jobs(study, teacher, settings, observe=True)):
        finite(result, world.names)
        accuracy = world.accuracy(result.model)
        observed = {name: np.asarray(result.observed[name]) for name in COSINES}
        kept = np.unique(np.geomspace(1, result.losses.shape[-1], points).round().astype(int)) - 1
        for run, own in enumerate(world.labels):
            labelled = {"condition": "perturbed", "amount": settings[place].amount, **own}
            values = {
                "test_accuracy": accuracy[run],
                "coverage": observed["update"][run, 0],
                "mean_gradient_cosine": observed["gradient"][run].mean(),
            }
            told = found.setdefault(run, [])
            told += [{**labelled, "metric": metric, "value": float(value)} for metric, value in values.items()]
            told += [
                {**labelled, "metric": f"{name}_cosine", "step": int(step + 1), "value": float(value)}
                for name in COSINES
                for step, value in zip(kept, observed[name][run, kept], strict=True)
            ]
    return [row for told in found.values() for row in told]


def linearised_rows(study: Study, teacher: FineTuned, settings: Sequence[Setting]) -> list[Row]:
    """The accuracy of students and of their linearizations, for channels of different widths."""
    world, told = study.world, list[Row]()
    assert isinstance(world, Digits)
    for condition in ("trained", "linearised"):
        some = jobs(study, teacher, settings, linear=condition == "linearised")
        found = {place: world.accuracy(result.model) for place, result in finished(world, some)}
        for run, own in enumerate(world.labels):
            for place, setting in enumerate(settings):
                name = labels(condition=condition, aux=setting.shown)
                told += rows(name, [own], {"test_accuracy": found[place][run:]})
    return told


def finished(world: Digits, some: Mapping[int, Job]) -> Iterator[tuple[int, Result]]:
    """The results of jobs after all their steps."""
    stops = {place: (job.steps,) for place, job in some.items()}
    for place, _, result in trained(some, stops, world.keys("students"), world.computation):
        yield place, result


def coverage_and_accuracy(results: Results, **wanted: Any) -> tuple[np.ndarray, np.ndarray]:
    """The coverage before training and the accuracy after it, for each perturbed student."""
    coverage, accuracy = (
        np.array(results.values(condition="perturbed", metric=metric, **wanted)) for metric in PAIR
    )
    return coverage, accuracy


def within_levels(results: Results) -> list[tuple[str, float]]:
    """The Spearman correlation of coverage and accuracy within each noise level, if it is defined."""
    found = []
    for amount in filter(None, results.distinct("amount")):
        pair = coverage_and_accuracy(results, amount=amount)
        if len(pair[0]) > 2 and all(len(set(values)) > 1 for values in pair):
            found.append((amount, float(stats.spearmanr(*pair).statistic)))
    return found


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    rank = stats.spearmanr(*coverage_and_accuracy(results)).statistic
    within = [spearman for _, spearman in within_levels(results)]
    levels = f"; {min(within):.2f} to {max(within):.2f} among runs of one noise level" if within else ""
    return f"Does coverage before training tell accuracy after it? Spearman {rank:.2f} over all runs{levels}"


def report(results: Results, config: Config) -> str:
    """Coverage and accuracy of each perturbation, their rank correlation, and the linearized students."""
    lines = [f"{config.data}, m = {config.aux}; mean and 95% t interval over runs"]
    for metric in ("test_accuracy", "coverage", "mean_gradient_cosine"):
        for group, estimate in results.estimates():
            if group["metric"] == metric and group["condition"] == "perturbed":
                lines.append(f"  {metric:21} noise {group['amount']:5} {estimate}")
    coverage, accuracy = coverage_and_accuracy(results)
    rank = stats.spearmanr(coverage, accuracy)
    lines.append(f"Spearman correlation of coverage and accuracy over {len(coverage)} runs: {rank.statistic:.3f}")
    lines += [f"  within noise {amount}: {spearman:.2f}" for amount, spearman in within_levels(results)]
    for group, estimate in results.estimates():
        if group["condition"] != "perturbed":
            lines.append(f"  {group['condition']:10} student, m = {group['aux']:3} {estimate}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Cosines during the run, accuracy against coverage, and real against linearized students."""
    figure, ((along, predict, linear),) = panels(3, size=(11.5, 3.8))
    amounts = list(filter(None, results.distinct("amount")))
    curves = {"gradient": "gradients of student and trait", "displacement": "displacements of student and teacher"}
    for color, (name, label) in zip(COLORS, curves.items(), strict=False):
        wanted = {"condition": "perturbed", "amount": amounts[0], "metric": f"{name}_cosine"}
        steps = filter(None, results.distinct("step"))
        runs_against(along, {int(step): results.values(**wanted, step=step) for step in steps}, color, label)
    along.axhline(0, color="grey", linewidth=1)
    start = f"initialization with noise {amounts[0]}" if float(amounts[0]) else "shared initialization"
    title = f"Along the run, {start}"
    along.set(xscale="log", xlabel="step of distillation", ylabel="cosine", title=title)
    along.legend(fontsize=7)

    for color, amount in zip(COLORS, amounts, strict=False):
        pair = coverage_and_accuracy(results, amount=amount)
        predict.plot(*pair, ".", color=color, label=f"noise {amount}")
    rank = stats.spearmanr(*coverage_and_accuracy(results)).statistic
    within = [spearman for _, spearman in within_levels(results)]
    levels = f",\n{min(within):.2f} to {max(within):.2f} within a noise level" if within else ""
    predict.set(
        xlabel="coverage: cosine of the first update\nwith the teacher's displacement",
        ylabel="test accuracy after distillation",
        title=f"Spearman {rank:.2f} over all runs{levels}",
    )
    predict.legend(fontsize=6.5, title="on the initialization", title_fontsize=6.5)

    for color, m in zip(COLORS, listed(config.counts, "--counts"), strict=False):
        kinds = (results.values(condition=name, aux=str(m)) for name in ("linearised", "trained"))
        linear.plot(*kinds, ".", color=color, label=f"m = {m}")
    linear.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    linear.set(
        xlabel="accuracy of the linearised student",
        ylabel="accuracy of the real student",
        title="The tangent kernel's prediction",
    )
    linear.legend(fontsize=7)
    note(linear, f"{config.data}; n = {config.seeds} runs; dots: single runs; lines: mean and 95% t interval")
    return figure
