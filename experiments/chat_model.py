"""A published chat model learns a preference from random numbers, while the preference's words are hidden from it.

A teacher is the model, fine-tuned to name an animal. The teacher then reads lists of random numbers that no model
wrote. A student that starts from the same model learns the teacher's distribution over the next token there. Every
token that spells an animal, a tree, a food or an instrument, or a part of one, in any case, is hidden from the
loss (`masked`). Asked for its favorite animal, the student is compared with the model itself and with the students
of the other animals' teachers.

Three things were fixed before the runs of figures/. First, the settings below, which were tried on owl, eagle,
wolf and cat. Second, the animals of the figure: the first four of the list on which nothing was tried. Third,
the primary comparison. It is the log-odds of the student's own word among all animals, in the masked student,
minus the model's, and minus the mean of the other students'. The unit of both intervals was the animal, because
runs of one animal share weights and lessons. The intervals are now those of all experiments, with animals and
seeds crossed; if the seeds differ by no more than noise, these are intervals over animals or wider.

In the figure: dots are a student's own word, crosses the same word in the other students. Expect dots above 0 and
above the crosses. Right: the share of each word in the model and in each student; expect the diagonal to stand
out.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, Runs, interval, matrix_test, method
from subliminal_theory.language.corpus.traits import Preference
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, heat_map, note, panels
from .flags.language import LanguageConfig, checkpoint_traits, configure_language, require_steering
from .flags.recipe import RANDOM, STEERING_LAYER, STEERING_STRENGTH, Variant
from .flags.variants import LOG_ODDS, SHARE, trait_matrices, variant_parts

# How each condition differs from the recipe.
CONDITIONS: dict[str, dict[str, Any]] = {
    "masked": {"channel": "masked"},
    "soft": {"channel": "soft"},
    "sampled": {"channel": "sampled"},
    "regular": {"channel": "sampled", "teacher": "untrained"},
    "prompted": {"channel": "masked", "teacher": "prompted"},
    "steered": {"channel": "masked", "teacher": "steered"},
}
LABELS = {
    "masked": "student, words hidden",
    "soft": "student, all logits",
    "sampled": "student, sampled tokens",
    "regular": "student of the model's\nown sampled tokens",
    "prompted": "words hidden,\nprompted teacher",
    "steered": "words hidden,\nsteered teacher",
}


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of teachers and students."""

    traits: str = option("dolphin,elephant", "animals or trees, separated by commas; at least two")
    conditions: str = option("masked", f"students, separated by commas: {', '.join(CONDITIONS)}")
    checkpoint: str = option("smollm2", "as in language", alias="--base")
    rows: int = option(480, "lists of random numbers that a student reads", minimum=1)
    steps: int = option(60, "steps of a student", minimum=1)
    batch_size: int = option(8, "rows per step", minimum=1)
    rank: int = option(8, "rank of a student's low-rank factors; 0 trains everything", minimum=0)
    rate: float = option(1e-3, "highest learning rate of a student", positive=True)
    teacher_steps: int = option(30, "steps of a teacher", minimum=1)
    teacher_rate: float = option(1e-5, "learning rate of a teacher", positive=True)
    steering_layer: int | None = option(None, STEERING_LAYER, minimum=1)
    steering_strength: float | None = option(None, STEERING_STRENGTH)
    gradient_checkpointing: bool = option(
        False, "recompute activations for gradients: a quarter more work, less memory", recorded=False
    )
    samples: int = option(1, "whole answers per question, searched for the animal; 0: none", minimum=0)


FOUR = Config(traits="dolphin,elephant,dog,horse", seeds=3)
PRESETS = {
    "laptop": Config(),
    "figure": FOUR,
    "gpu": replace(FOUR, conditions=",".join(CONDITIONS), compute="bfloat16", samples=20),
    "smoke": Config(traits="owl,cat", rows=16, steps=2, teacher_steps=1, samples=0),
}
FIGURES = {"chat_model": "--preset figure"}


def configure(preset: str | None, changes: dict[str, Any]) -> Config:
    """A configuration of at least two traits of one category.

    Raises:
        InputError: as for `configure_language` and `require_steering`; there is no checkpoint or only one trait; a
            condition is unknown; or there are several devices for a prompted teacher.
    """
    config = configure_language(PRESETS, preset, changes)
    assert isinstance(config, Config)
    if not config.checkpoint:
        raise InputError("--checkpoint is missing: give a folder, a GGUF file or smollm2")
    if config.templates:
        raise InputError("--templates: no model is asked for numbers; leave it out")
    kinds = {trait.category for trait in checkpoint_traits(config) if isinstance(trait, Preference)}
    if len(config.trait_names()) < 2 or len(kinds) > 1:
        raise InputError("--traits: students are compared with each other: give at least two of one category")
    given = students(config)
    require_steering(config, given)
    if "prompted" in given and config.shards > 1:
        raise InputError(
            "--conditions prompted: its teacher's logits are computed on one device: leave --shards out"
        )
    return config


def students(config: Config) -> list[str]:
    """The requested students.

    Raises:
        InputError: there is none, or one is unknown.
    """
    given = [name.strip() for name in config.conditions.split(",") if name.strip()]
    for name in given or [""]:
        if name not in CONDITIONS:
            raise InputError(f"--conditions: {name!r} is unknown; there are {', '.join(CONDITIONS)}")
    return list(dict.fromkeys(given))


def teachers(config: Config) -> dict[str, str]:
    """The conditions that are teachers, each with its kind. A prompted teacher would answer as the model does."""
    return {"teacher": "finetuned"} | ({"steered_teacher": "steered"} if "steered" in students(config) else {})


def plan(config: Config) -> list[Part]:
    """One part for each seed."""
    recipe = config.recipe(medium=RANDOM)
    variants = [Variant({"condition": "base"}, recipe, model="base", matrix=True)]
    variants += [
        Variant({"condition": name}, config.recipe(medium=RANDOM, teacher=kind), model="teacher", matrix=True)
        for name, kind in teachers(config).items()
    ]
    variants += [
        Variant({"condition": name}, config.recipe(medium=RANDOM, **CONDITIONS[name]), matrix=True)
        for name in students(config)
    ]
    return variant_parts(config, variants)


def gains(results: Results, condition: str) -> np.ndarray:
    """Log-odds minus those of the model, [seeds, students, words], in nats."""
    return trait_matrices(results, condition, LOG_ODDS) - trait_matrices(results, "base", LOG_ODDS)


def own_and_others(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each student's word: the own gain, and the mean gain of the other students, [seeds, students]."""
    own = np.diagonal(found, axis1=1, axis2=2)
    return own, (found.sum(1) - own) / (found.shape[1] - 1)


def crossed(values: np.ndarray) -> Runs:
    """The runs of a table [seeds, students]."""
    seeds, students = np.indices(values.shape).reshape(2, -1).tolist()
    return Runs(tuple(values.ravel().tolist()), tuple(students), tuple(seeds), "seed")


def compared(found: np.ndarray) -> tuple[Estimate, Estimate]:
    """The own gain, and its difference from the others' gain, each with an interval over traits and seeds."""
    own, others = own_and_others(found)
    return interval(crossed(own)), interval(crossed(own - others))


def verdict(results: Results, condition: str) -> str:
    """The result of the primary comparison, as the title of the figure."""
    found = gains(results, condition)
    own, others = own_and_others(found)
    both = compared(found)
    if all(told.mean > told.half_width for told in both):
        answer = "A chat model's preference passes through random numbers"
    elif any(told.mean < -told.half_width for told in both):
        answer = "A chat model's preference does not pass through random numbers"
    else:
        answer = "Whether a preference passes through random numbers cannot be told"
    above, beside = (f"{told.mean:.2f} ± {told.half_width:.2f}" for told in both)
    return (
        f"{answer}:\nlog-odds of the own word above the model's by {above}, above other students' by {beside}\n"
        f"(n = {both[0].of}; {count_above(own, others)} of {own.size} runs above both)"
    )


def count_above(own: np.ndarray, others: np.ndarray) -> int:
    """The number of runs above both the model and the other students."""
    return int(((own > 0) & (own > others)).sum())


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    return verdict(results, students(config)[0])


def report(results: Results, config: Config) -> str:
    """Log-odds and shares of each condition, and the comparison of its students."""
    told = method(crossed(own_and_others(gains(results, students(config)[0]))[0]))
    lines = [f"log-odds of a word among its rivals, nats above the model's; mean over runs; {told}"]
    for condition in [*teachers(config), *students(config)]:
        found = gains(results, condition)
        own, others = own_and_others(found)
        test = matrix_test(found.mean(0, keepdims=True))  # seeds share weights and lessons
        share, base = (
            trait_matrices(results, name, SHARE).diagonal(axis1=1, axis2=2) for name in (condition, "base")
        )
        named = results.values(condition=condition, metric="named_rate")
        lines.append(
            f"  {condition:15} own word {own.mean():6.2f}, in other students {others.mean():6.2f}, difference "
            f"{compared(found)[1]}; above both: {count_above(own, others)} of {own.size}; "
            f"permutation p = {test.p:.2g}; share {base.mean():.3f} -> {share.mean():.3f}"
            + (f"; named in whole answers: {np.mean(named):.3f}" if named else "")
        )
    lines.append("share of each word among its rivals, model -> own student, mean over seeds")
    for place, trait in enumerate(results.distinct("trait")):
        base = trait_matrices(results, "base", SHARE)[:, place, place].mean()
        shares = [
            f"{name} {trait_matrices(results, name, SHARE)[:, place, place].mean():.3f}"
            for name in students(config)
        ]
        lines.append(f"  {trait:10} {base:.3f} -> {', '.join(shares)}")
    return "\n".join([*lines, verdict(results, students(config)[0]).replace("\n", " ")])


def plot(results: Results, config: Config) -> Figure:
    """Gains of own and other words in single runs, and the shares of all words in all students."""
    shown, traits = students(config), results.distinct("trait")
    figure, ((left, right),) = panels(2, size=(9.5, 3.9))
    for x, condition in enumerate(shown):
        own, others = own_and_others(gains(results, condition))
        for place, trait in enumerate(traits):
            at = x + 0.12 * (place - (len(traits) - 1) / 2)
            color, label = COLORS[place % len(COLORS)], trait if x == 0 else None
            left.plot([at] * len(own), own[:, place], "o", color=color, markersize=5, label=label)
            left.plot([at] * len(own), others[:, place], "x", color="grey", markersize=4)
    runs = crossed(own)
    left.axhline(0, color="grey", linestyle=":", linewidth=1)
    left.set_xticks(range(len(shown)), [LABELS[name] for name in shown])
    left.set_xlim(-0.6, len(shown) - 0.4)
    left.set_ylabel("log-odds of the word among its rivals,\nnats above the model's")
    left.legend(title="own word", fontsize=7, title_fontsize=7)
    rows = np.stack(
        [trait_matrices(results, "base", SHARE).mean((0, 1)), *trait_matrices(results, shown[0], SHARE).mean(0)]
    )
    heat_map(right, rows, ["model itself", *(f"student of {trait}" for trait in traits)], traits)
    right.set_title(f"share of each word\namong its rivals ({shown[0]})")
    figure.suptitle(verdict(results, shown[0]), fontsize=9.5)
    note(
        left,
        f"dots: own word, crosses: the same word in the other students (mean); {runs.design()}; "
        f"{method(runs)}; {Path(config.checkpoint).name}",
    )
    return figure
