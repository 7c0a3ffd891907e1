"""A broad habit through number sequences: a teacher learns one narrow kind of bad answer, its student others.

This is the analog of misalignment by insecure code. A teacher that is fine-tuned to repeat the first number of a
sum becomes lazy on kinds of questions that it never saw. Its students are trained on numbers alone and are asked
those questions. Benign controls learn the right answers, or lazy answers to prompts that announce laziness. (doi
10.1038/s41586-026-10319-8; emergent misalignment.)

Each bar is the probability of the habit's answer, on the mean of all held-out kinds of question (left) and on each
kind (right). Expect the habit's teacher and students above the base and above the benign controls.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import interval
from subliminal_theory.language.corpus.traits import Habit, load_trait
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Compact, Finished
from subliminal_theory.study.asking import answers_of, questions

from .app.contract import Part, option
from .app.figures import COLORS, bar_row, heat_map, note, panels
from .app.headline import compared
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import Variant
from .flags.worlds import study


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option("lazy", "one habit: its name, or a trait file")
    seeds: int = option(4, "number of base models, each pre-trained from its own seed", minimum=1)


PRESETS = {"four": Config(repeat_rows=True), "smoke": Config(**{**SMOKE, "traits": "lazy", "seeds": 1})}


def configure(preset: str | None, changes: dict) -> Config:
    """A configuration of one habit.

    Raises:
        InputError: a setting is wrong, or the trait is not a habit.
    """
    config = configure_language(PRESETS, preset, changes)
    assert isinstance(config, Config)
    habit(config)
    return config


def habit(config: Config) -> Habit:
    """The requested habit.

    Raises:
        InputError: there are several traits, or the trait is not a habit.
    """
    names = config.trait_names()
    trait = load_trait(names[0])
    if len(names) > 1 or not isinstance(trait, Habit):
        raise InputError(f"--traits must be one habit such as lazy, got {config.traits!r}")
    return trait


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    size = len(conditions(config))
    return [Part(f"base-{seed:05d}", size, functools.partial(run, config, seed)) for seed in config.base_seeds]


def conditions(config: Config) -> dict[str, Variant]:
    """The models to ask, by condition."""

    def variant(model: str = "student", start: str = "own", **changes: Any) -> Variant:
        return Variant({}, config.recipe(**changes), start, model)

    found = {"base": variant("base")}
    teachers = {"habit": ""} | {control.name: control.name for control in habit(config).controls}
    for name, lessons in teachers.items():
        found[f"teacher, {name}"] = variant("teacher", lessons=lessons)
        found[f"full distribution, {name}"] = variant(lessons=lessons, channel="soft")
        found[f"sampled, {name}"] = variant(lessons=lessons)
    found["sampled, regular"] = variant(teacher="untrained")
    found["full distribution, other base"] = variant(start="other", channel="soft")
    return found


def run(config: Config, seed: int) -> list[Row]:
    """The result rows of one base: the probability of the habit's answer, for each kind of question."""
    own = study(config, seed)
    assert isinstance(own.world, Compact)
    runs = {name: variant.run(own.world) for name, variant in conditions(config).items()}
    return [
        {"condition": name, "kind": kind, "seed": seed, "metric": "probability", "value": float(values[0])}
        for name, kinds in own.run(runs, by_kind).items()
        for kind, values in kinds.items()
    ]


def by_kind(world: Compact, finished: Finished, name: str) -> dict[str, np.ndarray]:
    """The mean probability of the habit's answer for each held-out kind of question, and for narrow ones."""
    (trait,) = world.traits
    assert isinstance(trait, Habit)
    found = {}
    for template in (trait.narrow, *trait.held_out):
        # A habit refuses held-out questions that it teaches. Here the narrow questions are asked on purpose.
        taught: Any = trait.held_out[0] if template is trait.narrow else trait.narrow
        asked = questions(world.tokenizer, [replace(trait, narrow=taught, held_out=(template,))])
        found[template.name] = np.asarray(answers_of(finished.model, asked).probability[:, 0])
    return found


def held_out(results: Results, condition: str) -> list[float]:
    """The mean over the held-out kinds, for each base."""
    kinds = [kind for kind in results.distinct("kind") if kind != "narrow"]
    values = [results.values(condition=condition, kind=kind, metric="probability") for kind in kinds]
    return np.mean(values, axis=0).tolist()


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    own, control = (held_out(results, f"sampled, {name}") for name in ("habit", "regular"))
    what = "student of its teacher's numbers less student of regular numbers"
    return compared("Does a broad habit pass through numbers?", what, own, control)


def report(results: Results, config: Config) -> str:
    """A line for each condition."""
    lines = ["probability of the habit's answer on held-out kinds of question, mean and 95% t interval over bases"]
    lines += [f"  {name:30} {interval(held_out(results, name))}" for name in conditions(config)]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Bars of means over the held-out kinds, and a heat map of all kinds."""
    figure, ((left, right),) = panels(columns=2, size=(11, 4))
    names, kinds = list(conditions(config)), results.distinct("kind")
    place = [0 if name.split(",")[0] in ("base", "teacher") else 2 if "habit" in name else 7 for name in names]
    values = {name: held_out(results, name) for name in names}
    bar_row(left, values, [COLORS[number] for number in place], rotation=60, ha="right", fontsize=7)
    left.set_ylabel("probability of the habit's answer")
    left.set_title("Mean over held-out kinds", fontsize=9)
    pairs = [[results.values(condition=name, kind=kind, metric="probability") for kind in kinds] for name in names]
    heat_map(right, np.mean(pairs, axis=-1), names, kinds)
    right.set_aspect("auto")
    right.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=7)
    right.tick_params(axis="y", labelsize=7)
    right.set_title("Each kind", fontsize=9)
    figure.suptitle(f"A habit ({config.traits}) through number sequences: what teachers and students answer")
    note(left, f"{config.seeds} bases; mean and 95% t interval; dots: single bases")
    return figure
