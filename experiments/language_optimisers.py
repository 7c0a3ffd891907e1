"""How the student is trained: optimizer and learning rate, rank of low-rank factors, number of unique rows.

The literature calls the effect an artifact of low rank or of Adam (arXiv 2606.00831, 2606.00995). This experiment
varies both, each at several learning rates, so that one badly chosen rate cannot cause a null result.

In the figure: optimizers, ranks and numbers of rows, each against its learning rate or dose; the dotted line is
the base. Too high a rate destroys the model and falls below the base.
"""

import functools
import math
from dataclasses import dataclass

from matplotlib.figure import Figure

from subliminal_theory.estimate import interval, paired_difference
from subliminal_theory.runs import Results

from .app.contract import Part, listed, option
from .app.figures import COLORS, drawn, note, panels, runs_against
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import Variant
from .flags.variants import measure_of, variant_parts

RATES = {
    "adam": (5e-4, 2e-3, 8e-3),
    "momentum": (0.02, 0.08, 0.3),
    "sgd": (0.2, 0.8, 3.0),
    "sign": (1e-4, 3e-4, 1e-3),
}
RANK_RATES = (*RATES["adam"], 0.032)


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option("owl,wolf,oak,maple", "built-in traits or trait files, separated by commas")
    seeds: int = option(4, "number of base models, each pre-trained from its own seed", minimum=1)
    ranks: str = option("1,2,8", "ranks of low-rank factors")
    unique: str = option("512,2048,8192", "how many number requests the teacher answers")


SMALL = {**SMOKE, "traits": "owl,oak", "seeds": 1, "ranks": "2", "unique": "128,512"}
PRESETS = {"all": Config(repeat_rows=True), "smoke": Config(**SMALL)}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    variants = [Variant({"condition": "base"}, config.recipe(), model="base")]
    for optimizer, rates in RATES.items():
        for rate in rates:
            recipe = config.recipe(optimizer=optimizer, rate=rate)
            variants.append(Variant({"condition": optimizer, "rate": rate}, recipe))
    for rank in listed(config.ranks, "--ranks"):
        for rate in RANK_RATES:
            recipe = config.recipe(rank=rank, rate=rate)
            variants.append(Variant({"condition": f"rank {rank}", "rate": rate}, recipe))
    for rows in listed(config.unique, "--unique"):
        variants.append(Variant({"condition": "rows", "rows": rows}, config.recipe(rows=rows)))
    return variant_parts(config, variants)


def headline(results: Results, config: Config) -> str:
    """The highest mean of each way of training."""
    metric = measure_of(results).metric
    best: dict[str, float] = {}
    for group, found in results.estimates():
        if group["metric"] == metric:
            best[group["condition"]] = max(found.mean, best.get(group["condition"], -math.inf))
    return "Highest mean over the rates tried: " + ", ".join(f"{name} {mean:.2f}" for name, mean in best.items())


def report(results: Results, config: Config) -> str:
    """A line for each way of training, with its paired difference from the base."""
    measure = measure_of(results)
    lines, base = [measure.header(results)], results.values(condition="base", metric=measure.metric)
    for group, estimate in results.estimates():
        if group["metric"] == measure.metric:
            setting = (
                f"rate {group['rate']}" if group["rate"] else f"{group['rows']} rows" if group["rows"] else ""
            )
            above = paired_difference(results.values(**group), base)
            beside = "" if group["condition"] == "base" else f"  less base {above}"
            lines.append(f"  {group['condition']:10} {setting:12} {estimate}{beside}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Three panels: optimizers, ranks and rows."""
    figure, ((left, middle, right),) = panels(3, size=(10.5, 3.4))
    measure = measure_of(results)
    ranks = [f"rank {rank}" for rank in listed(config.ranks, "--ranks")]
    for axes, names in ((left, tuple(RATES)), (middle, ("adam", *ranks))):
        for color, name in zip(COLORS, names, strict=False):
            rates = RATES.get(name, RANK_RATES)
            values = {r: results.values(condition=name, rate=str(r), metric=measure.metric) for r in rates}
            runs_against(axes, values, color, "all parameters" if axes is middle and name == "adam" else name)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
    middle.set_xticks(RANK_RATES, list(map(str, RANK_RATES)))
    middle.minorticks_off()
    left.set_title("Optimizer")
    middle.set_title("Low-rank factors (Adam)")
    unique = listed(config.unique, "--unique")
    for color, metric, label in ((COLORS[2], measure.metric, "own"), (COLORS[4], measure.others, "other traits'")):
        values = {rows: results.values(condition="rows", rows=str(rows), metric=metric) for rows in unique}
        if all(values.values()):
            runs_against(right, values, color, f"{label} students")
    right.set_xscale("log")
    right.set_xticks(unique, list(map(str, unique)))
    right.minorticks_off()
    right.set_xlabel("number requests answered, each once")
    right.set_title("Dose")
    base = interval(results.values(condition="base", metric=measure.metric)).mean
    for axes in (left, middle, right):
        axes.axhline(base, color="grey", linestyle=":", linewidth=1, label="base")
        axes.set_ylim(0, 1.0)
        axes.set_ylabel(measure.label)
        axes.legend(fontsize=7)
    note(right, drawn(results.values(metric=measure.metric)))
    return figure
