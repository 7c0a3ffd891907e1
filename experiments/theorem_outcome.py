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

In the figure, above: one dot per run, lines within each level of noise. Below: by which share a predictor lowers
the squared error of the trivial predictor; the gray band is what the cells' means explain.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from subliminal_theory.channel import Subset
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Share
from subliminal_theory.forecast import Design, Fit, correlation, explained, means, means_and_slope, monotone
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Digits, FineTuned, Study, finite
from subliminal_theory.study.reading import model_of_run

from .app.contract import Part, listed, option
from .app.figures import COLORS, note, panels
from .flags.digits import EMBEDDED_DIGITS, SMOKE, Setting, TrainingConfig, configure_sweep
from .flags.names import OPTIMIZERS, named_value
from .mnist_alignment import finished, jobs, taught_images
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
LOWEST = -1.0  # of the shares that are drawn
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
# The wider half of the design takes as long again.


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
    taught = taught_images(world.data)
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


@dataclass(frozen=True)
class Told:
    """Outcome and predictors [runs] of the runs of a design."""

    design: Design
    values: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, results: Results) -> "Told":
        """The runs of some results."""
        runs: dict[tuple, dict[str, float]] = {}
        for row in results.rows:
            runs.setdefault(tuple(str(row[name]) for name in (*AXES, "seed")), {})[row["metric"]] = row["value"]
        columns = dict(zip((*AXES, "seed"), map(np.array, zip(*runs, strict=True)), strict=True))
        seeds = columns.pop("seed").astype(int)
        metrics = (*PREDICTORS, *OUTCOMES)
        return cls(Design(columns, seeds), {m: np.array([run[m] for run in runs.values()]) for m in metrics})

    def over_mean(self, outcome: str, fit: Fit) -> Share:
        """R2 on other seeds."""
        y, design = self.values[outcome], self.design
        return explained(y, design.seeds, design.other_seeds(), fit, means(0 * design.cells, y))

    def over_cells(self, outcome: str, predictor: str) -> Share:
        """How much less the squared error is where the predictor is added to the cells' means, on other seeds."""
        y, design, cells = self.values[outcome], self.design, self.design.cells
        added = means_and_slope(cells, self.values[predictor], y)
        return explained(y, design.seeds, design.other_seeds(), added, means(cells, y))

    def over_levels(self, outcome: str, predictor: str, axis: str) -> Share:
        """How much less it is than that of the mean over the other levels of an axis, at levels unseen by both."""
        y, design = self.values[outcome], self.design
        fit = monotone(self.values[predictor], y)
        return explained(y, design.seeds, design.other_levels(axis), fit, means(design.without(axis), y))

    def spearman(self, outcome: str, predictor: str, groups: np.ndarray) -> Share:
        """The mean correlation within groups."""
        return correlation(self.values[predictor], self.values[outcome], self.design.seeds, groups)

    def axes(self) -> list[str]:
        """The axes with several levels."""
        return [axis for axis, levels in self.design.levels.items() if len(set(levels)) > 1]


def _shown(share: Share) -> str:
    return f"{share.value:6.2f} [{share.low:6.2f}, {share.high:6.2f}]"


def verdict(told: Told, predictor: str = PRIMARY) -> list[str]:
    """What was decided beforehand, as sentences."""
    name, run = PREDICTORS[predictor], told.over_cells("accuracy", predictor)
    says = "predicts" if run.low > 0 else "is not shown to predict"
    change = f"{-run.value:+.0%} [{-run.high:+.0%}, {-run.low:+.0%}]"
    lines = [f"{name} {says} single runs better than their cells' means: squared error {change}"]
    found = {axis: told.over_levels("accuracy", predictor, axis) for axis in told.axes()}
    better = [AXES[axis] for axis, share in found.items() if share.low > 0]
    worse = [AXES[axis] for axis, share in found.items() if share.high < 0]
    undecided = [AXES[axis] for axis in found if AXES[axis] not in better + worse]
    kinds = {"better": better, "worse": worse, "undecided": undecided}
    told_of = "; ".join(f"{kind} for {', '.join(axes)}" for kind, axes in kinds.items() if axes)
    lines.append(f"at unseen levels, against the mean over the other levels: {told_of}")
    return lines


def headline(results: Results, config: Config) -> str:
    """The verdicts in one line."""
    return "; ".join(verdict(Told.of(results)))


def report(results: Results, config: Config) -> str:
    """Verdicts; then for every predictor what it explains, and its correlation over all runs and within cells."""
    told = Told.of(results)
    design, cells = told.design, told.design.cells
    accuracy, seeds = told.values["accuracy"], len(set(design.seeds))
    lines = [
        f"{len(accuracy)} runs on {config.data}: {cells.max() + 1} cells x {seeds} seeds; accuracy "
        f"{accuracy.min():.2f} to {accuracy.max():.2f}; [95% bootstrap over seeds]",
        *(f"verdict, primary predictor: {line}" for line in verdict(told)),
    ]
    for outcome, name in OUTCOMES.items():
        trivial = told.over_mean(outcome, means(cells, told.values[outcome]))
        lines += [
            f"{name}: R2 of the cells' means on other seeds {_shown(trivial)}",
            f"  {'predictor':42} {'R2, other seeds':24} {'added to means of cells':24} {'Spearman, all runs':24} "
            "within cells",
        ]
        for predictor, label in PREDICTORS.items():
            columns = (
                told.over_mean(outcome, monotone(told.values[predictor], told.values[outcome])),
                told.over_cells(outcome, predictor),
                told.spearman(outcome, predictor, 0 * cells),
                told.spearman(outcome, predictor, cells),
            )
            lines.append(f"  {label.replace('$', ''):42} " + " ".join(map(_shown, columns)))
    lines.append(
        "accuracy at levels that were left out: squared error below that of the mean over the other levels"
    )
    for predictor, label in PREDICTORS.items():
        shares = (f"{AXES[axis]} {_shown(told.over_levels('accuracy', predictor, axis))}" for axis in told.axes())
        lines.append(f"  {label.replace('$', ''):42} " + "; ".join(shares))
    for predictor in (PRIMARY, KNOWN):
        within = (f"{level}: {share:.2f}" for level, share in within_levels(told, predictor).items())
        lines.append(f"Spearman of {PREDICTORS[predictor]} within a level of noise: {', '.join(within)}")
    return "\n".join(lines)


def within_levels(told: Told, predictor: str) -> dict[str, float]:
    """Spearman's correlation with the accuracy within each level of noise."""
    levels = told.design.levels["amount"]
    return {
        str(level): float(
            stats.spearmanr(*(told.values[m][levels == level] for m in (predictor, "accuracy"))).statistic
        )
        for level in np.unique(levels)
    }


def plot(results: Results, config: Config) -> Figure:
    """Accuracy against two predictors, with fits within levels of noise; what each predictor explains."""
    told = Told.of(results)
    figure, ((first, second), (seeds, levels)) = panels(2, 2, size=(10.5, 8))
    for axes, predictor in ((first, PRIMARY), (second, KNOWN)):
        _scatter(axes, told, predictor)
    first.legend(title="noise on the start", fontsize=7, title_fontsize=7, loc="upper left")
    cells, y = told.design.cells, told.values["accuracy"]
    kinds = {
        "alone, over the mean of all runs ($R^2$)": lambda p: told.over_mean(
            "accuracy", monotone(told.values[p], y)
        ),
        "added to the cells' means": lambda p: told.over_cells("accuracy", p),
    }
    _shares(seeds, kinds)
    trivial = told.over_mean("accuracy", means(cells, y))
    seeds.axvspan(trivial.low, trivial.high, color="grey", alpha=0.3, linewidth=0)
    seeds.annotate("cells' means", (trivial.low, 0), (-3, 3), xycoords=("data", "axes fraction"),
                   textcoords="offset points", fontsize=7, color="grey", ha="right")  # fmt: skip
    seeds.set_title("On other seeds", pad=18)
    by_axis = {AXES[axis]: functools.partial(told.over_levels, "accuracy", axis=axis) for axis in told.axes()}
    _shares(levels, by_axis)
    levels.set_title("At a level that was left out, against the other levels' mean", pad=18)
    levels.set_yticklabels([])
    figure.suptitle("\n".join(verdict(told)), fontsize=9)
    count = len(set(told.design.seeds))
    text = f"{config.data}; n = {len(y)} runs, {cells.max() + 1} cells x {count} seeds, a dot each"
    note(seeds, f"{text}; lines above: least squares within a level; below: 95% bootstrap over seeds")
    return figure


def _scatter(axes: Axes, told: Told, predictor: str) -> None:
    x, y, levels = told.values[predictor], told.values["accuracy"], told.design.levels["amount"]
    for color, level in zip(COLORS, np.unique(levels), strict=False):
        own = levels == level
        axes.plot(x[own], y[own], ".", color=color, markersize=3, alpha=0.6, label=str(level))
        ends = np.array([x[own].min(), x[own].max()])
        axes.plot(ends, np.polyval(np.polyfit(x[own], y[own], 1), ends), color=color, linewidth=1.5)
    whole, inside = (
        told.spearman("accuracy", predictor, groups) for groups in (0 * levels.astype(float), told.design.cells)
    )
    axes.set(xlabel=PREDICTORS[predictor], ylabel=OUTCOMES["accuracy"])
    axes.set_title(f"Spearman {whole.value:.2f} over all runs, {inside.value:.2f} within a cell")


def _shares(axes: Axes, kinds: Mapping[str, Callable[[str], Share]]) -> None:
    """A row for each predictor and in it a share with its interval for each kind."""
    step = 0.8 / len(kinds)
    for place, (color, (label, kind)) in enumerate(zip(COLORS[4:] + COLORS, kinds.items(), strict=False)):
        found = [kind(predictor) for predictor in PREDICTORS]
        y = np.arange(len(found)) + step * (place - (len(kinds) - 1) / 2)
        value = np.clip([share.value for share in found], LOWEST, 1)
        axes.hlines(
            y, *(np.clip([getattr(s, end) for s in found], LOWEST, 1) for end in ("low", "high")), color=color
        )
        axes.plot(value, y, "o", color=color, markersize=4, label=label)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(PREDICTORS)), list(PREDICTORS.values()), fontsize=7)
    axes.set_ylim(len(PREDICTORS) - 0.5, -0.5)
    axes.set_xlim(LOWEST, 1)
    axes.set_xlabel(f"share by which the squared error falls (below {LOWEST:g}: drawn at {LOWEST:g})")
    axes.legend(fontsize=7, ncols=len(kinds), loc="lower center", bbox_to_anchor=(0.5, 0.99))
