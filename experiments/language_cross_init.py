"""Teachers of each base, students of each base: a trait passes only where teacher and student share their base.

Bases differ in the seed of their initialisation and of the order of the same corpus.
(doi 10.1038/s41586-026-10319-8, the cross-model heat maps.)
"""

import functools
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.estimate import t_interval
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import bar_row, crossed, heat_map, note, panels
from .flags.language import HEADER, SMOKE, LanguageConfig, Variant, configure_language, variant_parts
from .flags.recipe import CHANNEL


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option("owl,wolf,oak,maple", "built-in traits or trait files, separated by commas")
    seeds: int = option(3, "base models, each pre-trained from a seed of its own", minimum=2)
    channel: str = option("soft", CHANNEL)


PRESETS = {"three": Config(), "smoke": Config(**{**SMOKE, "traits": "owl,oak", "seeds": 2})}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """A part for each teacher's base, with students of every base."""
    recipe = config.recipe(channel=config.channel)
    variants = [
        Variant({"condition": "student", "shift": shift}, recipe, start="other" if shift else "own", other=shift)
        for shift in range(config.seeds)
    ]
    return variant_parts(config, [Variant({"condition": "base"}, recipe, model="base"), *variants], wrap=True)


def shared_and_crossed(results: Results) -> dict[str, list[float]]:
    """The probability of the trait's word, by whether teacher and student share their base."""
    found: dict[str, list[float]] = {"base": results.values(condition="base", metric="probability")}
    shifts = [shift for shift in results.distinct("shift") if shift != ""]
    for shift in shifts:
        values = results.values(condition="student", metric="probability", shift=shift)
        found.setdefault("same base" if shift == "0" else "other base", []).extend(values)
    return found


def heat(results: Results, config: Config) -> np.ndarray:
    """Mean probability of the trait's word [teacher's base, student's base]."""
    table = np.zeros((config.seeds, config.seeds))
    for teacher in range(config.seeds):
        for shift in range(config.seeds):
            wanted = {"seed": config.first_seed + teacher, "shift": str(shift), "metric": "probability"}
            table[teacher, (teacher + shift) % config.seeds] = np.mean(results.values(**wanted))
    return table


def report(results: Results, config: Config) -> str:
    """The means, and the table of bases."""
    lines = [HEADER]
    lines += [f"  {name:11} {t_interval(values)}" for name, values in shared_and_crossed(results).items()]
    lines.append("teacher's base (rows), student's base (columns):")
    lines += ["  " + " ".join(f"{value:.3f}" for value in row) for row in heat(results, config)]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """The table as a heat map, and the means as bars."""
    figure, ((left, right),) = panels(2, size=(8.0, 3.6))
    seeds = [str(seed) for seed in config.base_seeds]
    heat_map(left, heat(results, config), seeds, seeds)
    left.set(xlabel="base of the student", ylabel="base of the teacher", title="Probability of the trait's word")
    bar_row(right, shared_and_crossed(results))
    right.set_ylabel("probability of the trait's word")
    note(right, f"{config.channel} channel; {crossed(len(config.trait_names()), config.seeds)}")
    return figure
