"""Each student gets its own teacher's trait and no other: students of many traits, each asked for all of them.

The statistic is the mean over bases of the diagonal of the trait x trait matrix less what is beside it; under the
null hypothesis which student had which teacher does not matter, so students are permuted within their base.
"""

import functools
from dataclasses import dataclass

from matplotlib.figure import Figure

from subliminal_theory.estimate import MatrixTest, matrix_test
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import heat_map, note, panels
from .flags.language import SMOKE, LanguageConfig, Variant, configure_language, trait_matrices, variant_parts
from .flags.recipe import CHANNEL


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option("owl,wolf,cat,fox,oak,maple,pine,elm", "built-in traits or trait files; at least two")
    seeds: int = option(2, "base models, each pre-trained from a seed of its own", minimum=1)
    channel: str = option("sampled", CHANNEL)


PRESETS = {"eight": Config(), "smoke": Config(traits="owl,wolf,oak", seeds=1, **SMOKE)}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """A part for each base."""
    recipe = config.recipe(channel=config.channel)
    return variant_parts(config, [Variant({"condition": "student"}, recipe, matrix=True)])


def test(results: Results) -> MatrixTest:
    """The diagonal statistic and its permutation p."""
    return matrix_test(trait_matrices(results, "student"))


def report(results: Results, config: Config) -> str:
    """The statistic, and the mean matrix."""
    found, mean, traits = test(results), trait_matrices(results, "student").mean(0), results.distinct("trait")
    width = max(map(len, traits))
    lines = [f"diagonal - off-diagonal = {found.statistic:.3f}, permutation p = {found.p:.2g}"]
    lines.append("teacher's trait (rows), asked for (columns): " + " ".join(traits))
    lines += [
        f"  {trait:{width}} " + " ".join(f"{value:.3f}" for value in row)
        for trait, row in zip(traits, mean, strict=True)
    ]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """The mean matrix as a heat map."""
    traits, mean, found = results.distinct("trait"), trait_matrices(results, "student").mean(0), test(results)
    figure, ((axes,),) = panels(size=(1.6 + 0.55 * len(traits), 1.4 + 0.5 * len(traits)))
    heat_map(axes, mean, traits, traits)
    axes.tick_params(axis="x", rotation=45)
    title = "Probability of the word asked for"
    axes.set(xlabel="asked for", ylabel="trait of the student's teacher", title=title)
    statistic = f"diagonal - rest = {found.statistic:.3f}, permutation p = {found.p:.2g}"
    note(axes, f"mean of {config.seeds} bases; {statistic}")
    return figure
