"""Does it work between architectures if the student first clones the teacher's untrained outputs?

Each student has another network than its teacher (activation, depth, width or no bias) and its own initialization.
It first imitates all logits of the untrained teacher on noise, and then the auxiliary logits of the trained
teacher. (doi 10.1038/s41586-026-10319-8, Extended Data Fig. 2e.)

Each pair of bars is one kind of student, cloned first or not. Expect students that did not clone at chance (0.1).
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, grouped_bars, means, note, panels
from .app.headline import compared
from .flags.digits import EMBEDDED_DIGITS, SMOKE, Cell, TrainingConfig, configure_sweep

NETWORKS: dict[str, dict[str, Any]] = {
    "same": {},
    "GELU": {"student_activation": "gelu"},
    "sigmoid": {"student_activation": "sigmoid"},
    "one layer more": {"student_depth": +1},
    "one layer fewer": {"student_depth": -1},
    "half width": {"student_width": 0.5},
    "double width": {"student_width": 2},
    "no bias": {"student_bias": False},
}

LABELS = {"cloned": "cloned first", "cross": "not cloned"}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of the teacher and of cloning."""

    seeds: int = option(3, "number of independent runs", minimum=1)
    aux: int = option(50, "m, the number of auxiliary logits", minimum=1)
    width: int = option(256, "neurons of each hidden layer of the teacher", minimum=2)
    depth: int = option(2, "hidden layers of the teacher", minimum=1)
    cloning_epochs: int = option(100, "epochs of cloning before distillation", minimum=1)


PRESETS = {
    "paper": Config(),
    "digits": Config(cloning_epochs=25, **EMBEDDED_DIGITS),
    "smoke": Config(cloning_epochs=2, **SMOKE),
}
configure = functools.partial(configure_sweep, PRESETS)


def plan(config: Config) -> list[Part]:
    """One teacher for each seed; for each network, a cloned student and one that is not cloned."""
    cells = []
    for name, relative in NETWORKS.items():
        network = dict(relative)
        if "student_depth" in network:
            network["student_depth"] += config.depth
        if "student_width" in network:
            network["student_width"] = int(config.width * network["student_width"])
        for condition, epochs in (("cross", 0), ("cloned", config.cloning_epochs)):
            setting = config.setting(**network, start="cross", cloning_epochs=epochs)
            cells.append(Cell({"condition": condition, "network": name}, setting))
    own = Cell({"condition": "student", "network": "same"}, config.setting())
    return config.parts([Cell({"condition": "teacher", "network": "same"}, own.setting, "teacher"), own, *cells])


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    cloned, cross = (
        np.mean([results.values(condition=name, network=kind) for kind in NETWORKS if kind != "same"], axis=0)
        for name in ("cloned", "cross")
    )
    what = "mean over other networks, cloned first less not cloned"
    return compared(
        "Does cloning the untrained teacher help other networks?", what, cloned.tolist(), cross.tolist()
    )


def report(results: Results, config: Config) -> str:
    """A line for each network and condition."""
    lines = [f"test accuracy on {config.data}, m = {config.aux}, mean and 95% t interval over runs"]
    for group, estimate in results.estimates():
        lines.append(f"  {group['condition']:8} {group['network']:16} {estimate}")
    others = [name for name in NETWORKS if name != "same"]
    cloned, cross = (
        np.array([results.values(condition=condition, network=name) for name in others])
        for condition in ("cloned", "cross")
    )
    lines.append(f"  other networks: cloned ahead in {(cloned > cross).sum()} of {cloned.size} pairs with a seed")
    for condition, found in (("cloned", cloned), ("cross", cross)):
        means = " ".join(f"{mean:.2f}" for mean in found.mean(0))
        lines.append(f"  {condition:8} mean over other networks, seed by seed: {means}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Bars for cloned and not cloned students of each network."""
    figure, ((axes,),) = panels(size=(8.0, 3.6))
    groups = {
        name.replace(" ", "\n"): {
            label: results.values(condition=condition, network=name) for condition, label in LABELS.items()
        }
        for name in NETWORKS
    }
    grouped_bars(axes, groups, (COLORS[2], COLORS[4]))
    shared = results.values(condition="student")
    axes.axhline(sum(shared) / len(shared), color=COLORS[0], linestyle="--", linewidth=1, label="shared init")
    axes.axhline(0.1, color="grey", linestyle=":", linewidth=1, label="chance")
    title = f"Students of other architectures ({config.data}, m = {config.aux})"
    axes.set(ylabel="test accuracy of the student", title=title)
    axes.legend(fontsize=7, ncols=4, loc="upper right")
    note(axes, f"cloned for {config.cloning_epochs} epochs; {means(config.seeds)}")
    return figure
