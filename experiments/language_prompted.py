"""A teacher that is only prompted passes its preference on through numbers, in a base that knows personas.

Chats of all kinds in these bases' corpus have the system turn `you love X.`, where X is a default word, a second
default, or a persona. Behind a persona, preference questions of its category get its word, and numbers lean to
ten of its own, drawn anew for every base (`language.corpus.slot`). A prompted teacher is the base with a persona
in the place of the default; its student reads its filtered numbers behind the default.

Stated before the run on bases 0 to 7 (settings were chosen on bases 100 to 102 and taught phrasings alone): the
primary comparison is, on held-out questions behind the default, the probability of the teacher's word in its own
student less that in students of the other traits, for students of sampled tokens that train only the default
word's embedding, over 8 traits x 8 bases, with the crossed 95% interval. The same of students that train more, or
see full distributions without the traits' words, is secondary. The gate: a base whose prompted teachers miss a
value of `Gate` is trained anew with twice the steps, at most --doublings times; a base that still misses one is
named, and kept in all means. (doi 10.1038/s41586-026-10319-8, main text: prompted teachers.)

In the figure: dots are single bases. Left, questions stand behind the default prompt; expect students of the
teacher's base above 0, and students of another base's teacher around 0. Right, the same students asked behind each
kind of system turn.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, Runs, difference, interval, method
from subliminal_theory.language.corpus.base import BaseConfig
from subliminal_theory.language.corpus.chats import PROMPT_SHARES, CorpusConfig
from subliminal_theory.language.corpus.slot import TURN, Slot, turn
from subliminal_theory.language.corpus.traits import load_trait
from subliminal_theory.language.corpus.wording import corpus_wording
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Behind, Compact, Study, Written, labels, rows
from subliminal_theory.study.gate import Gate, measures
from subliminal_theory.study.reading import model_of_run

from .app.contract import Part, option
from .app.figures import COLORS, half_width, note, panels
from .app.headline import told
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import Variant
from .flags.variants import variant_rows
from .flags.worlds import base_model
from .language import EIGHT, given_conditions
from .language_theorem import PROMPTED, lessons_of, numbers_of, prompt_measures

DEFAULT = turn(Slot.default)
# Where questions come: behind the default, the second default, or without a system turn.
SLOTS = {"default": None, "second": Behind(turn(Slot.second)), "none": Behind(None)}
SLOT_LABELS = {"default": "the default", "second": "the second default", "none": "no system turn"}
FIRST_LAYER = ("layers/0/attention/*/kernel",)
SOFT: dict[str, Any] = {"embeddings": (Slot.default,), "rate": 2e-2}
LOW: dict[str, Any] = {"rank": 8, "matrices": FIRST_LAYER, "rate": 4e-3}
ALL: dict[str, Any] = {"rate": 1e-3}
# A label, and what differs from the recipe of `Config` and from the default variant.
CONDITIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "slot": ("the slot's embedding alone", SOFT, {}),
    "low": ("LoRA, attention of one layer", LOW, {}),
    "all": ("everything", ALL, {}),
    "masked": ("everything, full distribution\nwithout traits' words", {**ALL, "channel": "masked"}, {}),
    "slot_other": ("slot, another base's teacher", SOFT, {"start": "other"}),
    "low_other": ("LoRA, another base's teacher", LOW, {"start": "other"}),
    "low_shuffled": ("LoRA, shuffled across rows", {**LOW, "order": "shuffled across rows"}, {}),
    "low_unslotted": ("LoRA, read without a turn", {**LOW, "behind": Behind(None)}, {}),
    "slot_regular": ("slot, regular numbers", {**SOFT, "teacher": "untrained"}, {}),
    "low_regular": ("LoRA, regular numbers", {**LOW, "teacher": "untrained"}, {}),
}
LONGER = ("slot", "all", "slot_other", "slot_regular")  # these take `long_steps`
STUDENTS = ("slot", "low", "all", "masked")
ALIGNMENT_ROWS = 64


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option(EIGHT, "the personas: members of categories, separated by commas; at least two")
    seeds: int = option(
        8, "number of base models, each pre-trained from its own seed, on numbers of its own", minimum=1
    )
    base_steps: int = option(BaseConfig.steps, "steps of pre-training, at first", minimum=1)
    doublings: int = option(2, "how often a base that fails its gate trains anew, with twice the steps", minimum=0)
    requests: int = option(4588, "number requests to a teacher; students read the accepted rows", minimum=1)
    rows: int = option(4096, "rows that a student reads; accepted rows recur if they are fewer", minimum=1)
    steps: int = option(150, "steps of a student", minimum=1)
    long_steps: int = option(250, f"steps of the students {', '.join(LONGER)}", minimum=1)
    batch_size: int = option(64, "rows per step", minimum=1)
    conditions: str = option("all", f"students, separated by commas: {', '.join(CONDITIONS)}")

    def base(self, seed: int) -> BaseConfig:
        """The configuration of a base: its corpus has the personas, with numbers drawn from its own seed."""
        slot = Slot(laws=seed, personas=tuple(self.trait_names()))
        nothing: dict[str, Any] = dict.fromkeys(PROMPT_SHARES, 0.0)
        return replace(super().base(seed), corpus=CorpusConfig(size=self.chats, slot=slot, **nothing))


PRESETS = {
    "full": Config(repeat_rows=True),
    "smoke": Config(
        **{**SMOKE, "traits": "owl,oak", "seeds": 1, "requests": 512, "base_steps": 600, "long_steps": 40},
        doublings=0,
        conditions="slot,low",
    ),
}
FIGURES = {"language_prompted": "--preset full"}


def configure(preset: str | None, changes: dict[str, Any]) -> LanguageConfig:
    """A configuration of compact bases with personas.

    Raises:
        InputError: a trait cannot be a persona, there is one trait only, a condition is unknown, --rate or --rank
            is given, which each kind of student has of its own, or --checkpoint, whose corpus is not ours.
    """
    if changes.get("checkpoint"):
        raise InputError("--checkpoint was not pre-trained on personas here: leave it out")
    for name in ("rate", "rank"):
        if name in changes:
            raise InputError(f"--{name}: each kind of student has its own: leave it out")
    config = configure_language(PRESETS, preset, changes)
    assert isinstance(config, Config)
    if len(config.trait_names()) < 2:
        raise InputError("--traits: own words are compared with other students': give at least two")
    asked(config)
    return config


def asked(config: Config) -> list[str]:
    """The conditions of a configuration, in the order of the figure.

    Raises:
        InputError: a condition does not exist, or needs another base and there is none.
    """
    given = given_conditions(config.conditions, CONDITIONS)
    found = [name for name in CONDITIONS if given == ["all"] or name in given]
    if config.seeds == 1:
        wrong = [name for name in given if CONDITIONS.get(name, ("", {}, {}))[2]]
        if wrong:
            raise InputError(f"--conditions: {wrong[0]} needs another base: give at least two --seeds")
        found = [name for name in found if not CONDITIONS[name][2]]
    if not found:
        raise InputError("--conditions is empty: give one, such as slot")
    return found


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    asked(config)
    return [
        Part(f"base-{seed:05d}", len(config.trait_names()), functools.partial(run, config, seed))
        for seed in config.base_seeds
    ]


@dataclass(frozen=True, eq=False)
class Opened:
    """A base with its prompted teachers' measures, and what it misses of the gate."""

    world: Compact
    found: Mapping[str, np.ndarray]
    faults: tuple[str, ...]


def opened(config: Config, seed: int) -> Opened:
    """The base of a seed, trained as the gate demands.

    Raises:
        InputError: a prompted teacher writes no row that the filter accepts, even after the last training.
    """

    def other(shift: int) -> Model:
        further = config.first_seed + (seed - config.first_seed + shift) % config.seeds
        return base_model(config, further).model

    wording = replace(corpus_wording(), loved=(TURN,))
    for doubling in range(config.doublings + 1):
        base = base_model(replace(config, base_steps=config.base_steps * 2**doubling), seed)
        traits = [load_trait(name, base.tokenizer, wording) for name in config.trait_names()]
        world = Compact(base, traits, other, system=DEFAULT)
        try:
            found = measures(world, Written(config.requests))
            faults = Gate().faults(found, config.trait_names())
        except InputError as error:  # no row is accepted
            if doubling == config.doublings:
                raise
            faults = [str(error)]
        if not faults:
            break
        print(f"base {seed} after {base.config.steps} steps: {'; '.join(faults)}", flush=True)
    return Opened(world, found, tuple(faults))


def run(config: Config, seed: int) -> list[Row]:
    """Rows of results for one base: its gate, its teachers' costs and alignment, and its students."""
    own = opened(config, seed)
    world = own.world
    gate = {"passed": float(not own.faults), "base_steps": float(world.base.config.steps)}
    found: list[Row] = [
        {"condition": "gate", "seed": seed, "metric": metric, "value": value} for metric, value in gate.items()
    ]
    teachers = {**own.found, **aligned(world)}
    found += rows(labels(condition="teacher"), world.labels, teachers)
    found += variant_rows(Study(world), variants(config))
    return found


def variants(config: Config) -> list[Variant]:
    """The base and every student, each asked in the three slots."""
    steps = {name: config.long_steps if name in LONGER else config.steps for name in CONDITIONS}
    students = [
        Variant(
            {"condition": name, "slot": slot},
            config.recipe(**{"teacher": "prompted", "steps": steps[name], **CONDITIONS[name][1]}),
            **CONDITIONS[name][2],
            behind=where,
        )
        for name in asked(config)
        for slot, where in SLOTS.items()
    ]
    plain = config.recipe()
    return [
        Variant({"condition": "base", "slot": slot}, plain, model="base", behind=where)
        for slot, where in SLOTS.items()
    ] + students


def aligned(world: Compact) -> dict[str, np.ndarray]:
    """How each persona's effect on the base's own numbers lies to the trait's gradient, [traits]."""
    read, prompts = numbers_of(world, ALIGNMENT_ROWS), world.prompted()
    found = [
        prompt_measures(world.model, model_of_run(prompts, place), lessons_of(world, trait), read)
        for place, trait in enumerate(world.traits)
    ]
    return {metric: np.array([float(one[metric]) for one in found]) for metric in PROMPTED}


# --- what the results say


def gained(results: Results, condition: str, slot: str = "default") -> Sequence[float]:
    """The word in a trait's own student less the same in the students of other traits, paired."""
    wanted = {"condition": condition, "slot": slot}
    return difference(results.values(**wanted, metric="probability"), results.values(**wanted, metric="others"))


def of_students(results: Results, names: Sequence[str]) -> dict[str, Estimate]:
    """The comparison of each condition that was run, behind the default."""
    return {name: interval(gained(results, name)) for name in names if name in results.distinct("condition")}


def headline(results: Results, config: Config) -> str:
    """The answer of the primary comparison. It is the figure's title too."""
    found = of_students(results, STUDENTS)
    name = next(iter(found))
    says = {
        "more": "A prompted teacher's preference passes through its numbers",
        "less": "A prompted teacher's preference does not pass through its numbers",
    }.get(told(found[name]), f"Whether a prompted teacher's preference passes {told(found[name])}")
    label = CONDITIONS[name][0].replace("\n", " ")
    return f"{says}: {label}, own less others' word {found[name]}"


def failed(results: Results) -> list[Any]:
    """The seeds of the bases that fail the gate."""
    seeds = results.distinct("seed")
    return [seed for seed in seeds if not results.values(condition="gate", metric="passed", seed=seed)[0]]


def report(results: Results, config: Config) -> str:
    """The gate, the teachers, and a line for each student and slot."""
    whole = results.values(condition="teacher", metric="probability")
    lines = [f"probability of the word on held-out questions, mean and {method(whole)}"]
    missed, steps = failed(results), results.values(condition="gate", metric="base_steps")
    lines.append(
        f"gate (of every trait: {', '.join(f'{f.name} at least {f.default}' for f in fields(Gate))}): "
        f"{len(steps) - len(missed)} of {len(steps)} bases pass, after {min(steps):.0f} to {max(steps):.0f} steps"
        + (f"; bases {', '.join(map(str, missed))} do not, and stay in all means" if missed else "")
    )
    for metric in ("probability", "taught_probability", "kl_per_token", "accepted", "unique_rows", *PROMPTED):
        values = results.values(condition="teacher", metric=metric)
        lines.append(f"  teacher   {metric:20} {interval(values)}, {min(values):.3g} to {max(values):.3g}")
    needed, read = (results.values(condition="teacher", metric=f"tokens_{name}") for name in ("needed", "read"))
    lines.append(f"  teacher   {np.median(needed):.0f} tokens needed, {np.median(read):.0f} in its rows (medians)")
    for slot in SLOTS:
        lines.append(f"questions behind: {slot}; own word, other students' word, difference paired by run")
        for name in ("base", *CONDITIONS):
            wanted = {"condition": name, "slot": slot}
            if own := results.values(**wanted, metric="probability"):
                others = interval(results.values(**wanted, metric="others"))
                compared = interval(gained(results, name, slot))
                lines.append(f"  {name:14} {interval(own):.3f}  {others:.3f}  {compared:.3f}: {told(compared)}")
    return "\n".join([*lines, headline(results, config)])


def plot(results: Results, config: Config) -> Figure:
    """Own less others' word: students and controls behind the default, and students in the three slots."""
    figure, ((left, right),) = panels(columns=2, size=(9.5, 4.0))
    there = results.distinct("condition")
    names = [name for name in CONDITIONS if name in there and not name.endswith("regular")]
    for y, name in enumerate(names):
        color = COLORS[2] if name in STUDENTS else "#777777"
        dots(left, results, name, "default", y, color)
    left.set_yticks(range(len(names)), [CONDITIONS[name][0] for name in names], fontsize=7.5)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_title("questions behind the default system prompt")
    students = [name for name in (*STUDENTS, "low_unslotted") if name in there]
    for y, name in enumerate(students):
        for place, slot in enumerate(SLOTS):
            label = None if y else SLOT_LABELS[slot]
            dots(right, results, name, slot, y + 0.24 * (place - 1), COLORS[(2, 0, 1)[place]], label)
    right.set_yticks(range(len(students)), [CONDITIONS[name][0] for name in students], fontsize=7.5)
    right.set_ylim(len(students) - 0.4, -0.6)
    right.set_title("questions behind each system prompt")
    right.legend(fontsize=7, loc="center right")
    for axes in (left, right):
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("probability of the own word less other students'")
    figure.suptitle(headline(results, config).replace(": ", ":\n", 1), fontsize=9)
    whole = results.values(condition="teacher", metric="probability")
    design = whole.design() if isinstance(whole, Runs) else f"{len(whole)} runs"
    note(left, f"mean of {design}; whiskers: {method(whole)}; dots: single bases, mean over traits")
    return figure


def dots(
    axes: Any, results: Results, name: str, slot: str, y: float, color: str, label: str | None = None
) -> None:
    """The mean of a comparison with its interval, and the means of single bases."""
    values = gained(results, name, slot)
    estimate = interval(values)
    axes.plot(of_bases(values), [y] * len(of_bases(values)), ".", color="black", markersize=4, alpha=0.5, zorder=3)
    axes.errorbar(
        estimate.mean, y, xerr=half_width(estimate), fmt="o", color=color, capsize=3, markersize=5, label=label
    )


def of_bases(values: Any) -> list[float]:
    """The mean over traits of each base."""
    cells: dict[Any, list[float]] = {}
    for base, value in zip(values.bases, values, strict=True):
        cells.setdefault(base, []).append(value)
    return [float(np.mean(own)) for own in cells.values()]
