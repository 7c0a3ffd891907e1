"""What carries the trait along a whole run, and can transfer be told before the student is trained?

Students from ever more perturbed initialisations are followed at every step: the cosine of their gradient with the
trait's, of their displacement with the teacher's. Coverage, the cosine of the FIRST update with the teacher's
displacement, is set against the accuracy reached (arXiv 2606.22019 reports a Spearman correlation of about .95).
For each m the linearised student (empirical tangent kernel) is set against the real one.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from matplotlib.figure import Figure
from scipy import stats

from subliminal_theory.alignment import follow, linearised
from subliminal_theory.channel import Channel, weighted_mean
from subliminal_theory.distill import Trained, distill, require_finite
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row

from .app.contract import Part, listed, option
from .app.figures import COLOURS, note, panels, runs_against
from .laboratory import Laboratory
from .setting import Setting
from .sweep import EMBEDDED_DIGITS, Classroom, TrainingConfig, chunks, classroom, configure_sweep

# Digits on which the trait's gradient is measured.
TRAIT_IMAGES = 1000
COSINES = ("gradient", "update", "displacement")


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Which perturbations and channels."""

    seeds: int = option(10, "independent runs", minimum=1)
    aux: int = option(10, "m of the perturbed students", minimum=1)
    amounts: str = option(
        "0,0.05,0.1,0.2,0.4,0.8", "noise on the initialisation, in units of each layer's own scale"
    )
    counts: str = option("2,3,5,10", "values of m at which linearised students are trained, up to --aux")
    points: int = option(25, "steps of a run that are stored", minimum=2)


PRESETS = {"released": Config(), "digits": Config(aux=50, counts="3,10,50", **EMBEDDED_DIGITS)}
configure = functools.partial(configure_sweep, PRESETS)


def plan(config: Config) -> list[Part]:
    """Seeds in chunks."""
    amounts, counts = listed(config.amounts, "--amounts", float), listed(config.counts, "--counts")
    setting = config.setting(aux=config.aux)
    perturbed = [config.setting(aux=config.aux, start="perturbed", amount=amount) for amount in amounts]
    narrowed = [config.setting(aux=config.aux, shown=m) for m in counts]

    def run(seeds: Sequence[int]) -> list[Row]:
        room = classroom(setting, seeds, config.data_dir)
        return followed_rows(room, perturbed, config.points) + linearised_rows(room, narrowed)

    return chunks(range(config.first_seed, config.first_seed + config.seeds), config.chunk or 1, run)


def followed_rows(room: Classroom, settings: Sequence[Setting], points: int) -> list[Row]:
    """Accuracy, coverage and cosines along the run of perturbed students."""
    laboratory = room.laboratory.at(settings[0])
    models = stack([room.start(setting) for setting in settings], 1)
    for place, setting in enumerate(settings):
        start = jax.tree.map(lambda leaf, place=place: leaf[:, place], models)
        laboratory.at(setting).audit(start, room.init, room.teacher)
    trained = _follow(laboratory, models, room.init, room.teacher, laboratory.channel(), room.stream("students"))
    losses = trained.losses
    require_finite(losses.reshape(-1, losses.shape[-1]), [f"seed {s}" for s in room.seeds for _ in settings])
    accuracy = np.asarray(_accuracies(laboratory, trained.model))
    observed = {name: np.asarray(trained.observed[name]) for name in COSINES}
    kept = np.unique(np.geomspace(1, losses.shape[-1], points).round().astype(int)) - 1
    rows: list[Row] = []
    for run, seed in enumerate(room.seeds):
        for place, setting in enumerate(settings):
            labels = {"condition": "perturbed", "amount": setting.amount, "seed": int(seed)}
            values = {
                "test_accuracy": accuracy[run, place],
                "coverage": observed["update"][run, place, 0],
                "mean_gradient_cosine": observed["gradient"][run, place].mean(),
            }
            rows += [{**labels, "metric": metric, "value": float(value)} for metric, value in values.items()]
            rows += [
                {**labels, "metric": f"{name}_cosine", "step": int(step + 1), "value": float(value)}
                for name in COSINES
                for step, value in zip(kept, observed[name][run, place, kept], strict=True)
            ]
    return rows


def linearised_rows(room: Classroom, settings: Sequence[Setting]) -> list[Row]:
    """Accuracy of students and of their linearisations, for channels of different width."""
    laboratory = room.laboratory.at(settings[0])
    channels = stack([laboratory.at(setting).channel() for setting in settings], 0)
    rows: list[Row] = []
    for condition in ("trained", "linearised"):
        trained = _imitate(laboratory, condition, room.init, room.teacher, channels, room.stream("students"))
        accuracy = np.asarray(_accuracies(laboratory, trained.model))
        rows += [
            {
                "condition": condition,
                "aux": setting.shown,
                "seed": int(seed),
                "metric": "test_accuracy",
                "value": float(a),
            }
            for seed, values in zip(room.seeds, accuracy, strict=True)
            for setting, a in zip(settings, values, strict=True)
        ]
    return rows


def stack(trees: Sequence, axis: int) -> object:
    """Pytrees stacked leaf by leaf."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


@functools.partial(jax.jit, static_argnames="laboratory")
def _follow(
    laboratory: Laboratory, models: Model, init: Model, teacher: Model, channel: Channel, keys: Key[Array, " runs"]
) -> Trained:
    source = laboratory.source()
    images = laboratory.scale(jnp.asarray(laboratory.data.train_images[:TRAIT_IMAGES]))
    labels = jnp.asarray(laboratory.data.train_labels[:TRAIT_IMAGES].astype(np.int32))
    optimizer = laboratory.student_optimizer(laboratory.setting.rate)
    steps = laboratory.steps(laboratory.setting.epochs, source)

    def one(student: Model, init: Model, teacher: Model, key: Key[Array, ""]) -> Trained:
        def trait(params: object) -> Array:
            losses = laboratory.trait_loss(student.with_params(params)(images), labels)
            return weighted_mean(losses, jnp.ones(len(labels)))

        observe = follow(jax.grad(trait), init.params, teacher.params)
        return distill(student, teacher, channel, source, optimizer, steps, key, observe=observe)

    per_run = jax.vmap(one, in_axes=(0, None, None, None))
    return jax.vmap(per_run)(models, init, teacher, keys)


@functools.partial(jax.jit, static_argnames=("laboratory", "condition"))
def _imitate(
    laboratory: Laboratory,
    condition: str,
    init: Model,
    teacher: Model,
    channels: Channel,
    keys: Key[Array, " runs"],
) -> Trained:
    source = laboratory.source()
    optimizer = laboratory.student_optimizer(laboratory.setting.rate)
    steps = laboratory.steps(laboratory.setting.epochs, source)

    def one(channel: Channel, init: Model, teacher: Model, key: Key[Array, ""]) -> Trained:
        student = linearised(init) if condition == "linearised" else init
        return distill(student, teacher, channel, source, optimizer, steps, key)

    per_run = jax.vmap(one, in_axes=(0, None, None, None))
    return jax.vmap(per_run, in_axes=(None, 0, 0, 0))(channels, init, teacher, keys)


@functools.partial(jax.jit, static_argnames="laboratory")
def _accuracies(laboratory: Laboratory, models: Model) -> Array:
    return jax.vmap(jax.vmap(laboratory.accuracy, in_axes=(0, None, None)), in_axes=(0, None, None))(
        models, *laboratory.test()
    )


def coverage_and_accuracy(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """Coverage before training and accuracy after it, of each perturbed student."""
    chosen = (results.values(condition="perturbed", metric=metric) for metric in ("coverage", "test_accuracy"))
    coverage, accuracy = (np.array(values) for values in chosen)
    return coverage, accuracy


def report(results: Results, config: Config) -> str:
    """Coverage and accuracy of each perturbation, their rank correlation, and the linearised students."""
    lines = [f"{config.data}, m = {config.aux}; mean and 95% t interval over runs"]
    for metric in ("test_accuracy", "coverage", "mean_gradient_cosine"):
        for group, estimate in results.estimates():
            if group["metric"] == metric and group["condition"] == "perturbed":
                lines.append(f"  {metric:21} noise {group['amount']:5} {estimate}")
    coverage, accuracy = coverage_and_accuracy(results)
    rank = stats.spearmanr(coverage, accuracy)
    lines.append(f"Spearman correlation of coverage and accuracy over {len(coverage)} runs: {rank.statistic:.3f}")
    for group, estimate in results.estimates():
        if group["condition"] != "perturbed":
            lines.append(f"  {group['condition']:10} student, m = {group['aux']:3} {estimate}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Cosines along the run, coverage against accuracy, linearised against trained."""
    figure, ((along, predict, linear),) = panels(3, size=(11.5, 3.8))
    for colour, name, label in zip(
        COLOURS,
        ("gradient", "displacement"),
        ("gradients of student and trait", "displacements of student and teacher"),
        strict=False,
    ):
        steps = [int(step) for step in results.distinct("step") if step != ""]
        values = {
            step: results.values(condition="perturbed", amount="0.0", metric=f"{name}_cosine", step=str(step))
            for step in steps
        }
        runs_against(along, values, colour, label)
    along.axhline(0, color="grey", linewidth=1)
    along.set_xscale("log")
    along.set_xlabel("step of distillation")
    along.set_ylabel("cosine")
    along.set_title("Along the run, shared initialisation")
    along.legend(fontsize=7)

    for colour, amount in zip(COLOURS, results.distinct("amount"), strict=False):
        if amount == "":
            continue
        pairs = [
            results.values(condition="perturbed", amount=amount, metric=metric)
            for metric in ("coverage", "test_accuracy")
        ]
        predict.plot(*pairs, ".", color=colour, label=f"noise {amount}")
    rank = stats.spearmanr(*coverage_and_accuracy(results)).statistic
    predict.set_xlabel("coverage: cosine of the first update\nwith the teacher's displacement")
    predict.set_ylabel("test accuracy after distillation")
    predict.set_title(f"Told before training (Spearman {rank:.2f})")
    predict.legend(fontsize=6.5, title="on the initialisation", title_fontsize=6.5)

    for colour, m in zip(COLOURS, listed(config.counts, "--counts"), strict=False):
        pair = [results.values(condition=name, aux=str(m)) for name in ("linearised", "trained")]
        linear.plot(*pair, ".", color=colour, label=f"m = {m}")
    linear.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    linear.set_xlabel("accuracy of the linearised student")
    linear.set_ylabel("accuracy of the real student")
    linear.set_title("The tangent kernel's prediction")
    linear.legend(fontsize=7)
    note(linear, f"{config.data}; n = {config.seeds} runs; dots: single runs; lines: mean and 95% t interval")
    return figure
