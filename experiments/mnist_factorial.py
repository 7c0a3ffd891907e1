"""Which setting decides what a student learns? Many settings vary at once, and each gets its share of the spread.

`--axes` names settings and their levels. The experiment runs every combination, or a random balanced subset. For
each axis, the report gives its first-order share of the variance over settings, with a bootstrap interval over
settings. (This is Sobol's index, estimated as omega squared, so that an axis without effect has 0 on average.) The
report also gives the shares of joint effects and of the seed.

With one learning rate for all, SGD would learn nothing where Adam learns much. Optimizers are therefore compared
at equal multiples of their own reference rates (`relative_rate`). At its reference rate, an optimizer gives the
teacher with the best accuracy on held-out training images (`--preset rates_adam`, rates_sgd, rates_momentum). A
student that diverges counts with the accuracy of its constant answer.

In the figure: the share of each setting with its interval, and the mean accuracy at each of its levels. A share
whose interval reaches 0 cannot be told from no effect.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import t_interval, variance_shares
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, panels
from .flags.digits import EMBEDDED_DIGITS, METRICS, SMOKE, WHO, Cell, Setting, TrainingConfig, configure_sweep

AXES = (
    "init_law=lecun_normal,he_normal,torch; depth=1,2,3; width=128,256,512; channel_loss=kl,mse; aux=3,10; "
    "learning_rate=3e-4,1e-3; teacher_epochs=2,5; epochs=2,5; "
    "inputs=uniform,gaussian,blocks,blurred,digits; images=None,0; "
    "student_optimizer=adam,sgd,momentum; relative_rate=0.3,1,3"
)
# Labels in the figure for fields whose names are not clear.
LABELS = {
    "aux": "m (auxiliary logits)",
    "shown": "m (auxiliary logits shown)",
    "images": "noise images (0: never repeated)",
    "relative_rate": "rate / optimizer's reference",
    "together": "axes only together",
}
RATES = {
    "adam": "1e-4,3e-4,1e-3,3e-3,1e-2,3e-2",
    "sgd": "0.01,0.03,0.1,0.3",
    "momentum": "0.003,0.01,0.03,0.1,0.3",
}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """What varies, what is fixed, and how many settings are drawn."""

    seeds: int = option(2, "number of independent runs of each setting", minimum=1)
    axes: str = option(AXES, "settings and their levels, as in 'aux=3,10; width=128,256'")
    fixed: str = option("", "settings that are the same in all runs, as in 'aux=10; student_optimizer=sgd'")
    settings: int = option(120, "combinations to draw, with each level equally often; 0: all", minimum=0)
    who: str = option("student", "model to measure", choices=WHO[:2])
    metric: str = option(METRICS[0], "metric to measure", choices=METRICS)


PRESETS = {
    "spread": Config(),
    "sgd": Config(
        axes="aux=3,50; student_rate=0.1,0.3,1,3,10,30,100",
        fixed="student_optimizer=sgd",
        settings=0,
        seeds=3,
        first_seed=1000,
        metric="imitation_loss",
    ),
    "optimizers": Config(
        axes="student_optimizer=adam,sgd,momentum; relative_rate=0.1,0.3,1,3,10; shown=3,10,50",
        fixed="aux=50",
        settings=0,
        seeds=5,
    ),
    **{
        f"rates_{optimizer}": Config(
            axes=f"learning_rate={rates}",
            fixed=f"optimizer={optimizer}",
            settings=0,
            seeds=3,
            first_seed=1000,
            who="teacher",
            metric="validation_accuracy",
        )
        for optimizer, rates in RATES.items()
    },
    "teacher": Config(axes="teacher_epochs=0.05,0.1,0.25,0.5,1,2,3,5,10,20", settings=0, seeds=20),
    "digits": Config(
        axes="aux=10,50; width=64,256; channel_loss=kl,mse; inputs=uniform,digits", settings=12, **EMBEDDED_DIGITS
    ),
    "smoke": Config(axes="aux=10,50; width=64,256; channel_loss=kl,mse", settings=6, **{**SMOKE, "seeds": 2}),
}
configure = functools.partial(configure_sweep, PRESETS)
FIGURES = {
    "mnist_factorial": "",
    **{
        f"mnist_factorial_{name}": f"--preset {name}"
        for name in PRESETS
        if name not in ("spread", "digits", "smoke")
    },
}


def plan(config: Config) -> list[Part]:
    """One student for each setting. Settings with the same teacher share it."""
    levels, fixed = parse(config.axes, "--axes"), parse(config.fixed, "--fixed") if config.fixed else {}
    common = {name: values[0] for name, values in fixed.items()}
    for name, values in fixed.items():
        if len(values) > 1 or name in levels:
            raise InputError(f"--fixed {name} must have one value, and not be an axis")
    if config.metric == "validation_accuracy":
        common["validation"] = True
    chosen = combinations(levels, config.settings)
    cells = [
        Cell(
            {"condition": config.who, **{name: str(value) for name, value in point.items()}},
            config.setting(**{**common, **point}),
            config.who,
            metrics=(config.metric,),
            may_diverge=config.metric != "imitation_loss",
        )
        for point in chosen
    ]
    return config.parts(cells)


def parse(text: str, flag: str) -> dict[str, list[Any]]:
    """Parse axes and their levels. Levels have the types of their settings.

    Raises:
        InputError: an axis does not exist, is named twice or has no level, or a level is repeated or has the wrong
            type.
    """
    types, axes = get_type_hints(Setting), {}
    for entry in filter(str.strip, text.split(";")):
        name, _, values = (part.strip() for part in entry.partition("="))
        if name not in types:
            raise InputError(f"{flag}: there is no setting {name!r}; there are {', '.join(types)}")
        levels = [value.strip() for value in values.split(",") if value.strip()]
        if not levels:
            raise InputError(f"{flag}: axis {name!r} is empty: give it levels, as in '{name}=1,2'")
        if name in axes or len(set(levels)) < len(levels):
            raise InputError(f"{flag}: {name!r} or one of its levels is named twice")
        axes[name] = [_level(name, level, types[name], flag) for level in levels]
    if not axes:
        raise InputError(f"{flag} is empty: name settings and their levels, as in 'aux=3,10; width=128,256'")
    return axes


def _level(name: str, text: str, kind: Any, flag: str) -> Any:
    words: dict[Any, dict[str, Any]] = {type(None): {"none": None}, bool: {"true": True, "false": False}}
    kinds = get_args(kind) or (kind,)
    for wanted in kinds:
        if text.lower() in words.get(wanted, {}):
            return words[wanted][text.lower()]
        if wanted not in words:
            with contextlib.suppress(ValueError):
                return wanted(text)
    expected = " or ".join(wanted.__name__ for wanted in kinds if wanted is not type(None))
    raise InputError(f"{flag}: {name} takes values of type {expected}, got {text!r}")


def combinations(levels: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """All combinations of levels, or `count` random ones in which all levels of an axis occur equally often.

    The draw is always the same, so that it is a design and not a source of randomness.
    """
    everything = int(np.prod([len(values) for values in levels.values()]))
    if count == 0 or count >= everything:
        return [dict(zip(levels, point, strict=True)) for point in itertools.product(*levels.values())]
    rng = np.random.default_rng(0)

    def draw() -> dict[tuple[int, ...], dict[str, Any]]:
        columns = [rng.permutation(np.resize(np.arange(len(values)), count)) for values in levels.values()]
        rows = [tuple(map(int, row)) for row in zip(*columns, strict=True)]
        return {
            row: {name: values[i] for (name, values), i in zip(levels.items(), row, strict=True)} for row in rows
        }

    for _ in range(101):
        if len(found := draw()) == count:
            return list(found.values())
    # `count` is so close to all combinations that draws repeat some. Levels then occur almost equally often.
    while len(found) < count:
        for row, point in draw().items():
            if len(found) < count:
                found.setdefault(row, point)
    return list(found.values())


def table(results: Results, config: Config) -> tuple[dict[str, list[str]], np.ndarray]:
    """The level of each axis in each setting, and the values [settings, seeds]. Losses are decimal logarithms."""
    axes = list(parse(config.axes, "--axes"))
    points: dict[tuple, list[float]] = {}
    for row in results.rows:
        value = math.log10(row["value"]) if config.metric == "imitation_loss" else row["value"]
        points.setdefault(tuple(row[name] for name in axes), []).append(value)
    return {name: [point[i] for point in points] for i, name in enumerate(axes)}, np.array(list(points.values()))


def drawn_levels(levels: Mapping[str, Sequence[str]], config: Config) -> dict[str, list[str]]:
    """The levels of each axis that were drawn, in the order of --axes."""
    return {
        name: [str(value) for value in values if str(value) in levels[name]]
        for name, values in parse(config.axes, "--axes").items()
    }


def measured(config: Config) -> str:
    """A description of the values of `table`."""
    names = {"imitation_loss": "log10 of imitation loss (nats)"}
    return f"{names.get(config.metric, config.metric.replace('_', ' '))} of the {config.who}"


def headline(results: Results, config: Config) -> str:
    """The setting with the largest share of the variance."""
    shares = variance_shares(*table(results, config))
    name = max(shares.keys() - {"together", "seed"}, key=lambda axis: shares[axis].value)
    most, joint = shares[name], shares["together"].value
    told = f"{most.value:.2f} [{most.low:.2f}, {most.high:.2f}] of the variance of the {measured(config)}"
    return f"Which setting decides most? {LABELS.get(name, name)}: {told}; joint effects {joint:.2f}"


def report(results: Results, config: Config) -> str:
    """The range, the shares of the variance, and the mean of each level."""
    levels, values = table(results, config)
    axes, means = drawn_levels(levels, config), values.mean(1)
    low, high = means.min(), means.max()
    lines = [
        f"{measured(config)} on {config.data}: {len(means)} settings x {config.seeds} seeds, "
        f"from {low:.3g} to {high:.3g} (means of settings)",
        f"{'axis':20} share of variance [95% bootstrap over settings]   mean of each level",
    ]
    for name, share in variance_shares(levels, values).items():
        per_level = ", ".join(
            f"{level}: {means[np.array(levels[name]) == level].mean():.3g}" for level in axes.get(name, ())
        )
        lines.append(f"{name:20} {share.value:6.3f} [{share.low:6.3f}, {share.high:6.3f}]   {per_level}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Shares of the variance, and the accuracy at each level of each axis."""
    levels, values = table(results, config)
    axes, means, shares = drawn_levels(levels, config), values.mean(1), variance_shares(levels, values)
    rows = sum(map(len, axes.values())) + 0.6 * len(axes)
    figure, ((left, right),) = panels(2, size=(10.5, 1.6 + max(0.3 * len(shares), 0.2 * rows)))
    order = sorted(levels, key=lambda name: -shares[name].value)
    names = [*order, *(name for name in shares if name not in levels)]
    for y, name in enumerate(names):
        share = shares[name]
        left.barh(y, share.value, color=COLORS[0] if name in levels else "grey", alpha=0.85)
        left.plot([share.low, share.high], [y, y], color="black", linewidth=1.2)
    left.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
    left.invert_yaxis()
    left.set_xlim(left=-0.05)
    left.set_xlabel("share of the variance over settings (line: 95% bootstrap interval)")
    left.set_title("Shares of the variance of " + ("transmission" if config.who == "student" else "learning"))
    height, ticks, labels = 0.0, [], []
    for name in order:
        for level in axes[name]:
            here = means[np.array(levels[name]) == level]
            estimate = t_interval(here)
            right.plot(here, [height] * len(here), ".", color="grey", markersize=2.5, alpha=0.4)
            right.errorbar(estimate.mean, height, xerr=estimate.half_width, fmt="o", color=COLORS[3], markersize=4)
            ticks.append(height)
            labels.append(f"{LABELS.get(name, name)} = {level}")
            height += 1
        height += 0.6
    right.set_yticks(ticks, labels, fontsize=6)
    right.set_ylim(height, -1)
    right.set_xlabel(f"{measured(config)}\n(dots: settings, mean of {config.seeds} seeds; mean, 95% t)")
    right.set_title(f"{len(means)} settings on {config.data}" + (f", {config.fixed}" if config.fixed else ""))
    return figure
