"""Published numbers, run again: the published value, ours, and whether they agree.

This runs every entry of `experiments/published.toml`, or the named ones, in the setting that should give it. Let d
be ours - published, and h the half-width of its 95% interval (from ours and, if known, the published one). The
verdict is "differs" if |d| - h exceeds the entry's tolerance, "reproduced" if both |d| and h are within the
tolerance, and "cannot be told" otherwise.

In the figure: diamonds are published, dots with whiskers are ours. With five runs many numbers cannot be told;
that is no failure to reproduce.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

from matplotlib.figure import Figure

from subliminal_theory.estimate import Estimate, t_interval
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, panels, verdicts
from .app.registry import pick
from .flags.digits import Cell, SweepConfig, configure_sweep
from .published import Number, published

VERDICTS = {"reproduced": COLORS[2], "differs": COLORS[3], "cannot be told": COLORS[1]}


@dataclass(frozen=True)
class Config(SweepConfig):
    """Which numbers to reproduce, and on how many seeds. The registry has the other settings."""

    ids: str = option("", "numbers of the registry (default all)", positional=True)


PRESETS = {"published": Config(), "smoke": Config(ids="released-aux,released-reference", seeds=1)}
configure = functools.partial(configure_sweep, PRESETS)


def chosen(config: Config) -> list[Number]:
    """The requested numbers."""
    return pick(published(), config.ids, "published number")


def plan(config: Config) -> list[Part]:
    """One cell for each number. Cells with the same teacher share it."""
    return config.parts(
        [Cell({"condition": number.name}, number.setting, number.who, number.seeds) for number in chosen(config)]
    )


def verdict(number: Number, ours: Estimate) -> str:
    """Whether a published number and our runs agree."""
    halves = [half for half in (ours.half_width, number.interval) if not math.isnan(half)]
    distance, half = abs(ours.mean - number.value), math.hypot(*halves)
    if math.isnan(ours.half_width):
        return "cannot be told"
    if distance - half > number.tolerance:
        return "differs"
    return "reproduced" if max(distance, half) <= number.tolerance else "cannot be told"


def headline(results: Results, config: Config) -> str:
    """The numbers of verdicts."""
    numbers = chosen(config)
    found = Counter(verdict(number, t_interval(results.values(condition=number.name))) for number in numbers)
    return f"Of {len(numbers)} published numbers: " + ", ".join(f"{name} {found[name]}" for name in VERDICTS)


def report(results: Results, config: Config) -> str:
    """The table, then the notes on the numbers that were not reproduced."""
    lines, notes = [f"{'number':28} {'published':>9}  {'ours':22} verdict"], []
    for number in chosen(config):
        ours = t_interval(results.values(condition=number.name))
        answer = verdict(number, ours)
        lines.append(f"{number.name:28} {number.value:9.3f}  {ours!s:22} {answer}")
        if number.note and answer != "reproduced":
            notes.append(f"  {number.name}: {number.note}")
    if notes:
        lines += ["notes:", *notes]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """The published value and ours, with a line for each number, colored by verdict."""
    numbers = chosen(config)
    figure, ((axes,),) = panels(size=(7.0, 1.2 + 0.19 * len(numbers)))
    rows: list[tuple[str, Estimate, str]] = []
    for y, number in enumerate(numbers):
        runs = results.values(condition=number.name)
        ours = t_interval(runs)
        rows.append((number.name, ours, verdict(number, ours)))
        axes.plot(runs, [y] * len(runs), ".", color=VERDICTS[rows[-1][2]], markersize=2.5, alpha=0.35)
        published_half = None if math.isnan(number.interval) else number.interval
        axes.errorbar(
            number.value, y, xerr=published_half, fmt="D", color="black", markersize=4, fillstyle="none",
            zorder=5, label="published" if y == 0 else None,
        )  # fmt: skip
    verdicts(axes, rows, VERDICTS, "ours: ")
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel(f"test accuracy; ours: mean and 95% t interval of n = {config.seeds} runs, dots: single runs")
    axes.set_title("Published toy results, run again")
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, -0.14), ncols=4)
    return figure
