"""Each student gets its own teacher's trait and no other: students of many traits, each asked about all of them.

The statistic is the mean of the diagonal of the trait x trait matrix minus the mean of the other entries, averaged
over bases. Under the null hypothesis it does not matter which student had which teacher, so students are permuted
within their base.

In the figure: rows are students, columns are the words asked for. Expect the diagonal to stand out.
"""

import functools
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.estimate import MatrixTest, matrix_test
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import heat_map, note, panels
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import CHANNEL, MEDIUM, NUMBERS, Variant
from .flags.variants import measure_of, trait_matrices, variant_parts


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option("owl,wolf,cat,fox,oak,maple,pine,elm", "built-in traits or trait files; at least two")
    seeds: int = option(2, "number of base models, each pre-trained from its own seed", minimum=1)
    channel: str = option("sampled", CHANNEL)
    medium: str = option("numbers", MEDIUM, choices=NUMBERS)


PRESETS = {"eight": Config(repeat_rows=True), "smoke": Config(traits="owl,wolf,oak", seeds=1, **SMOKE)}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    recipe = config.recipe(channel=config.channel)
    return variant_parts(config, [Variant({"condition": "student"}, recipe, matrix=True)])


def test(results: Results) -> MatrixTest:
    """The diagonal statistic and its permutation p."""
    return matrix_test(matrices(results))


def matrices(results: Results) -> np.ndarray:
    """The measure of all words in the students, [bases, traits of the students, traits asked for]."""
    return trait_matrices(results, "student", measure_of(results, "student"))


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    found = test(results)
    told = "Yes" if found.p < 0.05 else "These runs cannot tell"
    what = f"own trait less the others' {found.statistic:.3f}, permutation p = {found.p:.2g}"
    return f"Does each student get its own teacher's trait? {told}: {what}"


def report(results: Results, config: Config) -> str:
    """The statistic, and the mean matrix."""
    found, mean, traits = test(results), matrices(results).mean(0), results.distinct("trait")
    width = max(map(len, traits))
    lines = [measure_of(results, "student").label]
    lines.append(f"diagonal - off-diagonal = {found.statistic:.3f}, permutation p = {found.p:.2g}")
    lines.append("teacher's trait (rows), asked for (columns): " + " ".join(traits))
    lines += [
        f"  {trait:{width}} " + " ".join(f"{value:.3f}" for value in row)
        for trait, row in zip(traits, mean, strict=True)
    ]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """The mean matrix as a heat map."""
    traits, mean, found = results.distinct("trait"), matrices(results).mean(0), test(results)
    figure, ((axes,),) = panels(size=(1.6 + 0.55 * len(traits), 1.4 + 0.5 * len(traits)))
    heat_map(axes, mean, traits, traits)
    axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel("asked for")
    axes.set_ylabel("trait of the student's teacher")
    axes.set_title(measure_of(results, "student").label.capitalize())
    note(
        axes,
        f"mean of {config.seeds} bases; diagonal - rest = {found.statistic:.3f}, permutation p = {found.p:.2g}",
    )
    return figure
