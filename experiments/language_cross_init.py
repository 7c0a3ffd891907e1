"""Teachers and students on every pair of bases: a trait passes only if teacher and student share their base.

Bases differ in the seed of their initialization and of the order of the corpus. The corpus is the same.
(doi 10.1038/s41586-026-10319-8, the cross-model heat maps.)

In the figure: bars for base, same base and other base, and the table of all pairs of bases. Expect the diagonal of
the table above the rest.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.estimate import interval, paired_difference
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, bar, drawn, heat_map, note, panels
from .app.headline import compared
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import CHANNEL, MEDIUM, NUMBERS, Variant
from .flags.variants import measure_of, variant_parts


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option("owl,wolf,oak,maple", "built-in traits or trait files, separated by commas")
    seeds: int = option(3, "number of base models, each pre-trained from its own seed", minimum=2)
    channel: str = option("soft", CHANNEL)
    medium: str = option("numbers", MEDIUM, choices=NUMBERS)


PRESETS = {"three": Config(repeat_rows=True), "smoke": Config(**{**SMOKE, "traits": "owl,oak", "seeds": 2})}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """One part for each teacher's base, with students of every base."""
    recipe = config.recipe(channel=config.channel)
    variants = [
        Variant({"condition": "student", "shift": shift}, recipe, start="other" if shift else "own", other=shift)
        for shift in range(config.seeds)
    ]
    return variant_parts(config, [Variant({"condition": "base"}, recipe, model="base"), *variants], wrap=True)


def shared_and_crossed(results: Results) -> dict[str, Sequence[float]]:
    """The measure of the trait's word, by whether teacher and student share their base.

    The base of a run is its teacher's. Students of one teacher on several other bases are averaged for intervals.
    """
    metric = measure_of(results).metric
    others = [row for row in results.rows if row.get("shift") not in ("", "0")]
    return {
        "base": results.values(condition="base", metric=metric),
        "same base": results.values(condition="student", metric=metric, shift="0"),
        "other base": replace(results, rows=others).values(condition="student", metric=metric),
    }


def heat(results: Results, config: Config) -> np.ndarray:
    """Mean measure of the trait's word [teacher's base, student's base]."""
    table, metric = np.zeros((config.seeds, config.seeds)), measure_of(results).metric
    for teacher in range(config.seeds):
        for shift in range(config.seeds):
            wanted = {"seed": config.first_seed + teacher, "shift": str(shift), "metric": metric}
            table[teacher, (teacher + shift) % config.seeds] = np.mean(results.values(**wanted))
    return table


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    found = shared_and_crossed(results)
    what = "student of its teacher's base less students of other bases"
    return compared("Does a trait need a shared base?", what, found["same base"], found["other base"])


def report(results: Results, config: Config) -> str:
    """The means, and the table of base pairs."""
    lines = [measure_of(results).header(results)]
    found = shared_and_crossed(results)
    lines += [f"  {name:11} {interval(values)}" for name, values in found.items()]
    lines.append(
        f"  same base less other base, paired {paired_difference(found['same base'], found['other base'])}"
    )
    lines.append("teacher's base (rows), student's base (columns):")
    lines += ["  " + " ".join(f"{value:.3f}" for value in row) for row in heat(results, config)]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """The table as a heat map, and the means as bars."""
    figure, ((left, right),) = panels(2, size=(8.0, 3.6))
    seeds = [str(seed) for seed in config.base_seeds]
    heat_map(left, heat(results, config), seeds, seeds)
    left.set_xlabel("base of the student")
    left.set_ylabel("base of the teacher")
    left.set_title(measure_of(results).label.capitalize())
    for x, (name, values) in enumerate(shared_and_crossed(results).items()):
        bar(right, x, values, COLORS[x], label=name)
    right.set_xticks(range(3), list(shared_and_crossed(results)))
    right.set_ylim(0, 1.1)
    right.set_ylabel(measure_of(results).label)
    note(right, f"{config.channel} channel; {drawn(shared_and_crossed(results)['base'])}")
    return figure
