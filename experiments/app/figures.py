"""The style of the project's figures: readable at half a page, safe for color-blind readers, runs as dots."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subliminal_theory.estimate import Estimate, Runs, interval, method

# Okabe and Ito's palette.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
}


def panels(columns: int = 1, rows: int = 1, size: tuple[float, float] = (6.4, 3.6)) -> tuple[Figure, np.ndarray]:
    """A figure in the project's style and its axes [rows, columns]. `size` is in inches."""
    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False)


def half_width(estimate: Estimate) -> float:
    """The half-width to draw: 0 for a single run."""
    return 0.0 if np.isnan(estimate.half_width) else estimate.half_width


def bar(
    axes: Axes, x: float, values: Sequence[float], color: str, width: float = 0.62, label: str | None = None
) -> None:
    """Draw the mean as a bar with its 95% interval and value, and single runs as dots spread sideways."""
    spread = 0.36 * width
    offsets = np.linspace(-spread, spread, len(values)) if len(values) > 1 else np.zeros(1)
    axes.plot(x + offsets, values, ".", color="black", markersize=3.5, alpha=0.55, zorder=3)
    estimate = interval(values)
    half = half_width(estimate)
    axes.bar(x, estimate.mean, width=width, color=color, alpha=0.85, zorder=1, label=label)
    axes.errorbar(x, estimate.mean, half, color="black", capsize=4, linewidth=1.4, zorder=4)
    top = max(estimate.mean + half, *values, estimate.mean)
    size = 9 if width > 0.5 else 6.5
    axes.annotate(f"{estimate.mean:.2f}", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=size)


def bar_row(
    axes: Axes, groups: Mapping[str, Sequence[float]], colors: Sequence[str] = COLORS, **ticks: Any
) -> None:
    """Draw a bar for each group of runs, with names below the axis. `ticks` style the names."""
    for x, values in enumerate(groups.values()):
        bar(axes, x, values, colors[x % len(colors)])
    axes.set_xticks(range(len(groups)), list(groups), **ticks)
    axes.set_ylim(0, 1.1)


def grouped_bars(
    axes: Axes, groups: Mapping[str, Mapping[str, Sequence[float]]], colors: Sequence[str] = COLORS
) -> None:
    """Draw a bar for each label with runs in each group. Groups are named below the axis, labels in a legend."""
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    step = 0.8 / len(labels)
    for x, group in enumerate(groups.values()):
        for place, (label, color) in enumerate(zip(labels, colors, strict=False)):
            if values := group.get(label):
                shift = step * (place - (len(labels) - 1) / 2)
                bar(axes, x + shift, values, color, width=0.95 * step, label=None if x else label)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1.1)


def bars(groups: Mapping[str, Sequence[float]], *, ylabel: str, title: str, chance: float | None = None) -> Figure:
    """One bar for each group of runs, with its mean, 95% interval and dots."""
    figure, ((axes,),) = panels()
    bar_row(axes, groups)
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
        axes.annotate("chance", (len(groups) - 0.55, chance), (0, 2), textcoords="offset points", color="grey")
    axes.set(ylabel=ylabel, xlim=(-0.65, len(groups) - 0.35), title=title)
    note(axes, f"bars: {drawn(min(groups.values(), key=len))}")
    return figure


def runs_against(axes: Axes, values: Mapping[Any, Sequence[float]], color: str, label: str | None = None) -> None:
    """Draw means as a line with 95% intervals, and single runs as dots."""
    estimates = [interval(runs) for runs in values.values()]
    half, means = list(map(half_width, estimates)), [estimate.mean for estimate in estimates]
    axes.errorbar(list(values), means, half, fmt="o-", color=color, capsize=3, markersize=4, zorder=3, label=label)
    for x, runs in values.items():
        axes.plot([x] * len(runs), runs, ".", color=color, markersize=3, alpha=0.35)


def log_axis(axes: Axes, ticks: Iterable[float]) -> None:
    """Make the x axis logarithmic, with ticks only at these numbers."""
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(map(str, ticks)))
    axes.minorticks_off()


def verdicts(
    axes: Axes, rows: Sequence[tuple[str, Estimate, str]], colors: Mapping[str, str], prefix: str = ""
) -> None:
    """Draw one row for each name, from the top: its estimate with the 95% interval, colored by its verdict."""
    labelled: set[str] = set()
    for y, (_, found, answer) in enumerate(rows):
        label = None if answer in labelled else prefix + answer
        labelled.add(answer)
        half, color = half_width(found), colors[answer]
        axes.errorbar(found.mean, y, xerr=half, fmt="o", color=color, markersize=4, capsize=2, label=label)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def heat_map(axes: Axes, table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draw a table of values as colors, starting at 0, with each value written in its cell."""
    image = axes.imshow(table, vmin=0, cmap="viridis")
    for row, column in np.ndindex(*table.shape):
        color = "white" if table[row, column] < 0.6 * table.max() else "black"
        value = f"{table[row, column]:.2f}"
        axes.text(column, row, value, ha="center", va="center", fontsize=6.5, color=color)
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axes, shrink=0.8)


def means(seeds: int) -> str:
    """The note below figures of means over runs."""
    return f"mean and 95% t interval of n = {seeds} runs; dots: single runs"


def drawn(runs: Sequence[float]) -> str:
    """What is drawn of such runs: their mean, their interval and dots."""
    if isinstance(runs, Runs):
        return f"mean of {runs.design()}; whiskers: {method(runs)}; dots: single runs"
    return f"mean of n = {len(runs)} runs; whiskers: 95% t interval; dots: single runs"


def note(axes: Axes, text: str) -> None:
    """Write a small line at the foot of the figure that says what is drawn."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.supxlabel(text, fontsize=7, color="grey", x=0.99, ha="right")
