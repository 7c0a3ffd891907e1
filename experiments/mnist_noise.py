"""Does it matter whether the noise is repeated each epoch, or how many random bits a pixel has?

For each seed, the student of `mnist` that sees auxiliary logits is distilled from one teacher on four kinds of
noise: a fixed set of images or images that never repeat, with 32 or 8 random bits per pixel. Differences are
paired by seed.

Each bar is the test accuracy of the student on one kind of noise. What counts are the paired differences in the
report: bars share teachers and seeds.
"""

from typing import Any

from matplotlib.figure import Figure

from subliminal_theory.estimate import paired_difference
from subliminal_theory.runs import Results

from . import mnist
from .app.contract import Part
from .app.figures import bars
from .app.headline import compared
from .flags.digits import Cell
from .mnist import PRESETS, Config, setting

__all__ = ["PRESETS", "configure", "headline", "plan", "plot", "report"]

KINDS: dict[str, dict[str, Any]] = {
    "fixed, 32 bits": {"images": None, "inputs": "uniform"},
    "fixed, 8 bits": {"images": None, "inputs": "uniform_8bit"},
    "fresh, 32 bits": {"images": 0, "inputs": "uniform"},
    "fresh, 8 bits": {"images": 0, "inputs": "uniform_8bit"},
}
configure = mnist.configure


def plan(config: Config) -> list[Part]:
    """One teacher for each seed, and a student for each kind of noise."""
    cells = [Cell({"condition": name}, setting(config, **kind)) for name, kind in KINDS.items()]
    return config.parts(cells)


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    fresh, fixed = (results.values(condition=name) for name in ("fresh, 32 bits", "fixed, 32 bits"))
    what = "test accuracy on new noise at each step less on a fixed set"
    return compared("Does noise that never repeats help?", what, fresh, fixed)


def report(results: Results, config: Config) -> str:
    """Means, and differences from the first kind of noise, paired by seed."""
    lines = [f"student on {config.aux} auxiliary logits, {config.data}: test accuracy, mean and 95% t interval"]
    lines += [f"  {group['condition']:16} {estimate}" for group, estimate in results.estimates()]
    first, *others = KINDS
    for name in others:
        difference = paired_difference(results.values(condition=name), results.values(condition=first))
        lines.append(f"  {name} minus {first}: {difference}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Bars with intervals, single runs as dots."""
    groups = {name.replace(", ", ",\n"): results.values(condition=name) for name in KINDS}
    title = f"Kind of noise, {config.data}, m = {config.aux}: same teachers, same seeds"
    return bars(groups, ylabel="test accuracy of the student", title=title, chance=0.1)
