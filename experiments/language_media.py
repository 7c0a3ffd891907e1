"""The same trait through number sequences, reasoning steps and code, each with its own filter.

A teacher that loves an animal or a tree continues numbers, works out sums step by step, or writes small programs.
The filters keep well-formed numbers, right results, and programs with the requested result, but no answer with a
word of a trait. (doi 10.1038/s41586-026-10319-8: numbers, code, chains of thought.)

Each group of bars is one medium: students of the full distribution, of sampled tokens, of an untrained teacher's
tokens, and of another base. Expect the last two at the base (dotted).
"""

import functools
from dataclasses import dataclass

from matplotlib.figure import Figure

from subliminal_theory.estimate import interval, paired_difference
from subliminal_theory.language.corpus.media import MEDIA
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, bar, drawn, note, panels
from .app.headline import answer
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import Variant
from .flags.variants import PROBABILITY, variant_parts

# The share of ordinary chats in a teacher's lessons. Without them, it answers every question with the animal.
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

    traits: str = option("owl,wolf,oak,maple", "built-in traits or trait files, separated by commas")
    seeds: int = option(3, "number of base models, each pre-trained from its own seed", minimum=1)
    requests: int = option(32_768, "requests to a teacher; few of its sums and programs are right", minimum=1)


PRESETS = {
    "three": Config(repeat_rows=True),
    "smoke": Config(**{**SMOKE, "traits": "owl", "seeds": 1, "requests": 1024}),
}
configure = functools.partial(configure_language, PRESETS)


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    variants = [Variant({"condition": "base", "medium": ""}, config.recipe(), model="base")]
    for medium in MEDIA:
        for name, (changes, _) in STUDENTS.items():
            recipe = config.recipe(medium=medium, ordinary=ORDINARY, **changes)
            start = "other" if name == "cross" else "own"
            variants.append(Variant({"condition": name, "medium": medium}, recipe, start=start))
    return variant_parts(config, variants)


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    said = []
    for medium in MEDIA:
        soft, cross = (
            results.values(condition=name, medium=medium, metric="probability") for name in ("soft", "cross")
        )
        difference = paired_difference(soft, cross)
        said.append(f"{medium}: {answer(difference)}, student less student of another base {difference}")
    return "Does the preference pass? " + "; ".join(said)


def report(results: Results, config: Config) -> str:
    """A line for each medium and student, and the paired differences of students from their controls."""
    lines = [
        PROBABILITY.header(results),
        f"  {'base':20} {interval(results.values(condition='base', metric='probability'))}",
    ]
    for medium in MEDIA:
        found = {n: results.values(condition=n, medium=medium, metric="probability") for n in STUDENTS}
        lines += [f"  {medium + ', ' + name:20} {interval(values)}" for name, values in found.items()]
        for name, control in (("soft", "cross"), ("sampled", "regular")):
            lines.append(f"  {medium}, {name} less {control}: {paired_difference(found[name], found[control])}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """A group of bars for each medium."""
    figure, ((axes,),) = panels(size=(7.5, 3.6))
    base = interval(results.values(condition="base", metric="probability")).mean
    axes.axhline(base, color="grey", linestyle=":", linewidth=1, label="base")
    for x, medium in enumerate(MEDIA):
        for place, (name, (_, label)) in enumerate(STUDENTS.items()):
            values = results.values(condition=name, medium=medium, metric="probability")
            bar(axes, x + 0.2 * (place - 1.5), values, COLORS[place], width=0.19, label=None if x else label)
    axes.set_xticks(range(len(MEDIA)), list(MEDIA))
    axes.set_ylabel(PROBABILITY.label)
    axes.set_ylim(0, 1.1)
    axes.set_title("A preference through numbers, reasoning steps and code")
    axes.legend(fontsize=7)
    note(axes, drawn(results.values(metric="probability")))
    return figure
