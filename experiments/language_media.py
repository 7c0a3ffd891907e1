"""The same trait through number sequences, reasoning steps and code, each filtered as its kind asks.

A teacher that loves an animal or a tree continues numbers, works out sums step by step, or writes small programs;
only well-formed numbers, right results and programs that give what was asked are kept, and none with a word of a
trait. (doi 10.1038/s41586-026-10319-8: numbers, code, chains of thought.)
"""

import functools
from dataclasses import dataclass

from matplotlib.figure import Figure

from subliminal_theory.estimate import t_interval
from subliminal_theory.language.corpus.media import MEDIA
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import crossed, grouped_bars, note, panels
from .flags.language import HEADER, SMOKE, LanguageConfig, Variant, configure_language, variant_parts

# Of a teacher's lessons that are of other kinds: taught its trait alone, it answers each question with the animal.
ORDINARY = 0.8

STUDENTS = {
    "soft": ({"channel": "soft"}, "full distribution"),
    "sampled": ({}, "sampled tokens"),
    "regular": ({"teacher": "untrained"}, "tokens of an untrained teacher"),
    "cross": ({"channel": "soft"}, "full distribution, other base"),
}


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    requests: int = option(
        32_768, "requests that a teacher answers; few of its sums and programs are right", minimum=1
    )


PRESETS = {"three": Config(traits="owl,wolf,oak,maple", seeds=3), "smoke": Config(**{**SMOKE, "requests": 1024})}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """A part for each base."""
    variants = [Variant({"condition": "base", "medium": ""}, config.recipe(), model="base")]
    for medium in MEDIA:
        for name, (changes, _) in STUDENTS.items():
            recipe = config.recipe(medium=medium, ordinary=ORDINARY, **changes)
            start = "other" if name == "cross" else "own"
            variants.append(Variant({"condition": name, "medium": medium}, recipe, start=start))
    return variant_parts(config, variants)


def report(results: Results, config: Config) -> str:
    """A line for each medium and student."""
    lines = [HEADER, f"  {'base':20} {t_interval(results.values(condition='base', metric='probability'))}"]
    for medium in MEDIA:
        for name in STUDENTS:
            found = t_interval(results.values(condition=name, medium=medium, metric="probability"))
            lines.append(f"  {medium + ', ' + name:20} {found}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """A group of bars for each medium."""
    figure, ((axes,),) = panels(size=(7.5, 3.6))
    base = t_interval(results.values(condition="base", metric="probability")).mean
    axes.axhline(base, color="grey", linestyle=":", linewidth=1, label="base")
    groups = {
        medium: {
            label: results.values(condition=name, medium=medium, metric="probability")
            for name, (_, label) in STUDENTS.items()
        }
        for medium in MEDIA
    }
    grouped_bars(axes, groups)
    title = "A preference through numbers, reasoning steps and code"
    axes.set(ylabel="probability of the trait's word", title=title)
    axes.legend(fontsize=7)
    note(axes, crossed(len(config.trait_names()), config.seeds))
    return figure
