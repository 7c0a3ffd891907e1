"""What part of the numbers carries the trait: full distributions, greedy or sampled tokens, divergence positions?

At divergence positions, the most likely tokens of teacher and base differ. It was published (arXiv 2509.23886)
that a student of these positions alone gets all of the trait, and a student of all other positions none of it.
This experiment tests that, and the order full distribution > divergence positions > greedy > sampled.

Each bar is the student of one channel; the dotted line is the base.
"""

import functools
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from subliminal_theory.estimate import interval, paired_difference
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, bar, drawn, note, panels
from .app.headline import compared
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import Variant
from .flags.variants import measure_of, variant_parts

CHANNELS: dict[str, dict[str, Any]] = {
    "full distribution": {"channel": "soft"},
    "without trait words": {"channel": "masked"},
    "sampled": {},
    "sampled, divergence positions": {"channel": "divergence"},
    "sampled, all other positions": {"channel": "rest"},
    "greedy": {"channel": "greedy"},
    "sampled, top-p 0.8": {"top_p": 0.8},
}


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option("owl,wolf,oak,maple", "built-in traits or trait files, separated by commas")
    seeds: int = option(3, "number of base models, each pre-trained from its own seed", minimum=1)


PRESETS = {"all": Config(repeat_rows=True), "smoke": Config(**{**SMOKE, "traits": "owl,oak", "seeds": 1})}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    variants = [Variant({"condition": "base"}, config.recipe(), model="base")]
    variants += [Variant({"condition": name}, config.recipe(**changes)) for name, changes in CHANNELS.items()]
    return variant_parts(config, variants)


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    chosen, rest = (
        results.values(condition=f"sampled, {where}", metric=measure_of(results).metric)
        for where in ("divergence positions", "all other positions")
    )
    what = "their student less the student of all other positions"
    return compared("Do divergence positions carry more of the trait?", what, chosen, rest)


def report(results: Results, config: Config) -> str:
    """A line for each channel, with its paired difference from the base."""
    measure = measure_of(results)
    lines, base = [measure.header(results)], results.values(condition="base", metric=measure.metric)
    for name in ("base", *CHANNELS):
        own, others = (results.values(condition=name, metric=m) for m in (measure.metric, measure.others))
        above = "" if name == "base" else f"  less base {paired_difference(own, base)}"
        beside = f"  other traits' students {interval(others)}" if others else ""
        lines.append(f"  {name:30} {interval(own)}{above}{beside}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """A pair of bars for each channel: the student, and the students of other traits."""
    figure, ((axes,),) = panels(size=(8.5, 3.6))
    names, measure = ("base", *CHANNELS), measure_of(results)
    for x, name in enumerate(names):
        own, others = (results.values(condition=name, metric=m) for m in (measure.metric, measure.others))
        bar(axes, x - 0.2, own, COLORS[2], width=0.38, label="own teacher's trait" if x == 0 else None)
        if others:
            label = "students of other traits" if x == 0 else None
            bar(axes, x + 0.2, others, COLORS[4], width=0.38, label=label)
    axes.set_xticks(
        range(len(names)), [name.replace(", ", ",\n").replace(" ", "\n", 1) for name in names], fontsize=7
    )
    axes.set_ylabel(measure.label)
    axes.set_ylim(0, 1.1)
    axes.set_title("What of the numbers carries the trait")
    axes.legend(fontsize=7)
    note(axes, drawn(results.values(metric=measure.metric)))
    return figure
