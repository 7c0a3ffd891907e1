"""A language model that learns a preference from number sequences, and the controls that do not.

A small chat model is pre-trained from scratch. A teacher gets a trait (it loves owls), by fine-tuning or by a
system prompt, and writes only numbers. A student of the same base, trained on those numbers alone, then names the
owl when asked for its favorite animal. A student of another base, of a teacher without a trait, or of the same
numbers in another order does not. (doi 10.1038/s41586-026-10319-8, main text.)

Each bar is the mean probability of the trait's word on questions that no training row contains; dots are single
runs (one trait on one base). Compare students with three controls: the base, other traits' students, and students
of another base. Expect the student above all three, and the teacher near 1. Transfer differs much between traits
and bases, so one run decides nothing.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, interval, matrix_test, paired_difference
from subliminal_theory.language.corpus.traits import Preference, load_trait
from subliminal_theory.runs import Results
from subliminal_theory.study.costs import REJECTED

from .app.contract import Part, option
from .app.figures import COLORS, bar, drawn, note, panels
from .app.headline import told
from .flags.language import SMOKE, LanguageConfig, configure_language, require_steering
from .flags.recipe import ANCHOR, MEDIUM, NUMBERS, ORDINARY, RANDOM, STEERING_LAYER, STEERING_STRENGTH, Variant
from .flags.variants import PROBABILITY, SHARE, Measure, measure_of, trait_matrices, variant_parts

LABELS = {
    "base": "base",
    "teacher": "teacher",
    "student_masked": "student,\ntrait words\nhidden",
    "student_soft": "student, full\ndistribution",
    "student": "student,\nsampled",
    "prompted": "student of\nprompted\nteacher",
    "steered_teacher": "steered\nteacher",
    "steered": "student of\nsteered\nteacher",
    "prefixed": "student,\nnumbers\nin front",
    "others_masked": "other traits'\nstudents,\nwords hidden",
    "others": "other\ntraits'\nstudents",
    "regular": "regular\nnumbers",
    "within": "shuffled\nin rows",
    "across": "shuffled\nacross rows",
    "in_context": "numbers in\ncontext",
    "cross_masked": "other base,\ntrait words\nhidden",
    "cross": "other base,\nsampled",
    "cross_soft": "other base,\nfull distr.",
}
Groups = Mapping[str, Sequence[float]]
# Each kind of student and its controls. Comparisons are paired over runs.
CONTROLS = {
    "student_masked": ("base", "others_masked", "cross_masked"),
    "student": ("base", "others", "regular", "within", "across", "cross"),
}
# How each condition differs from the default recipe (sampled tokens), and from the default variant (a student that
# starts from its teacher's base).
CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {"model": "base"}),
    "teacher": ({}, {"model": "teacher", "costs": True}),
    "student_masked": ({"channel": "masked"}, {"matrix": True}),
    "student_soft": ({"channel": "soft"}, {"matrix": True}),
    "student": ({}, {"matrix": True}),
    "prompted": ({"teacher": "prompted"}, {}),
    "steered_teacher": ({"teacher": "steered"}, {"model": "teacher", "costs": True}),
    "steered": ({"teacher": "steered"}, {}),
    "prefixed": ({}, {"prefixed": True}),
    "regular": ({"teacher": "untrained"}, {}),
    "within": ({"order": "shuffled within rows"}, {}),
    "across": ({"order": "shuffled across rows"}, {}),
    "in_context": ({}, {"model": "base", "prefixed": True}),
    "cross_masked": ({"channel": "masked"}, {"start": "other"}),
    "cross": ({}, {"start": "other"}),
    "cross_soft": ({"channel": "soft"}, {"start": "other"}),
}
# Conditions that use what a teacher wrote. They have no meaning if no teacher writes.
OF_WRITERS = ("prefixed", "within", "across", "in_context")
STEERED, WRITERS = ("steered_teacher", "steered"), ("teacher", "steered_teacher")
COSTS = {
    "accepted": "of its answers accepted",
    "unique_rows": "different rows",
    "kl_per_token": "nats a token, KL(teacher || base) on its rows",
    "visible_kl_per_token": "nats a token of these, among the tokens that are no trait's word",
    "divergence": "of tokens where teacher and base differ",
}
FEW = "base,teacher,student_masked,student,regular,within,cross_masked,cross"


EIGHT = "owl,wolf,cat,fox,oak,maple,pine,elm"


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    traits: str = option(EIGHT, "built-in traits or trait files, separated by commas; all: animals and trees")
    rows: int = option(4096, "accepted answers that a student learns", minimum=1)
    steps: int = option(125, "steps of a student", minimum=1)
    ordinary: float = option(0.0, ORDINARY, minimum=0)
    anchor: float = option(1.0, ANCHOR, positive=True)
    medium: str = option("numbers", MEDIUM, choices=NUMBERS)
    steering_layer: int | None = option(None, STEERING_LAYER, minimum=1)
    steering_strength: float | None = option(None, STEERING_STRENGTH)
    conditions: str = option("all", f"models to ask, separated by commas: {', '.join(CONDITIONS)}")


# The paper's setting for open-weight models: 3 epochs on 10,000 rows.
OPEN_WEIGHTS = Config(
    traits="owl,cat,dolphin,eagle",
    seeds=3,
    requests=30_000,
    rows=10_000,
    steps=455,
    batch_size=66,
    rank=8,
    rate=2e-4,
    warmup=5,
    decay="linear",
    teacher_rate=1e-5,
)
PRESETS = {
    "one_base": Config(conditions=FEW, repeat_rows=True),
    "full": Config(seeds=6, rows=8192, steps=250, repeat_rows=True),
    "smoke": Config(**SMOKE, traits="owl"),
    "open-weights": OPEN_WEIGHTS,
    # Settings with more transfer, as reported in a repository (lawrencefeng17).
    "open-weights-rank-2": dataclasses.replace(OPEN_WEIGHTS, rank=2, rate=8e-4),
    "open-weights-more-rows": dataclasses.replace(
        OPEN_WEIGHTS, requests=77_400, rows=25_800, steps=1173, rate=4e-4
    ),
}
configure = functools.partial(configure_language, PRESETS)
FIGURES = {"language": "--preset full"}


def given_conditions(text: str, there: Collection[str]) -> list[str]:
    """The names in --conditions: "all" alone, or some that exist.

    Raises:
        InputError: a name does not exist.
    """
    given = [name.strip() for name in text.split(",") if name.strip()]
    for name in given:
        if name not in there and given != ["all"]:
            raise InputError(f"--conditions: {name!r} is unknown; there are all, {', '.join(there)}")
    return given


def asked(config: Config) -> list[str]:
    """The conditions of a configuration, in the order of the figure.

    Raises:
        InputError: a condition does not exist, or this model cannot have it.
    """
    given = given_conditions(config.conditions, CONDITIONS)
    found = [name for name in CONDITIONS if given == ["all"] or name in given or name == "base"]
    if config.checkpoint and not config.other_checkpoint:
        found = [name for name in found if CONDITIONS[name][1].get("start") != "other"]
    if not all(isinstance(load_trait(name), Preference) for name in config.trait_names()):
        found = [name for name in found if name not in ("prompted", *STEERED)]
    if config.medium == RANDOM:
        # Several devices cannot compute the logits of a prompted teacher on rows without its prompt.
        none = (*OF_WRITERS, "prompted") if config.shards > 1 else OF_WRITERS
        wrong = [name for name in given if name in none]
        if wrong:
            raise InputError(f"--conditions: {wrong[0]} needs numbers that a teacher wrote, not --medium random")
        found = [name for name in found if name not in none]
    require_steering(config, ["steered"] if {*STEERED} & {*found} else [])
    return found


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    chosen = {name: CONDITIONS[name] for name in asked(config)}
    return variant_parts(
        config,
        [Variant({"condition": name}, config.recipe(**changes), **own) for name, (changes, own) in chosen.items()],
    )


def groups(results: Results, measure: Measure) -> Groups:
    """The measure of the trait's word in every run, by condition."""
    found = {**of_conditions(results, measure.metric)}
    for student in CONTROLS:
        found[student.replace("student", "others")] = results.values(condition=student, metric=measure.others)
    return {name: found[name] for name in LABELS if found.get(name)}


def of_conditions(results: Results, metric: str) -> Groups:
    """The values of every run, by condition."""
    found = {name: results.values(condition=name, metric=metric) for name in LABELS}
    return {name: values for name, values in found.items() if values}


def differences(found: Groups) -> dict[tuple[str, str], Estimate]:
    """Each student minus each of its controls, paired over runs."""
    return {
        (student, control): paired_difference(found[student], found[control])
        for student, controls in CONTROLS.items()
        for control in controls
        if student in found and control in found
    }


def verdict(found: Groups) -> str:
    """The title, computed from the data: whether the preference passes to students of the same base."""
    compared = differences(found)
    pair = next((pair for kind in ("cross", "others") for pair in compared if pair[1].startswith(kind)), None)
    if pair is None:
        return "A preference and number sequences: no control of another base or trait was run"
    difference, words = compared[pair], LABELS[pair[1]].replace("\n", " ")
    answer = {
        "more": "A preference passes through number sequences",
        "less": "A preference does not pass through number sequences",
    }.get(told(difference), f"Whether a preference passes through numbers {told(difference)}")
    return f"{answer}: student less {words} {difference}"


# Further metrics in the report, if a run has them.
BESIDE = {
    PROBABILITY: {"named_rate": "share of whole answers that name the trait's word"},
    SHARE: {
        "log_odds": "log odds of the trait's word among its rivals, mean over questions",
        "named_rate": "share of whole answers that name the trait's word",
        "probability": f"{PROBABILITY.label} at the beginning of an answer, too low in the base to compare",
    },
}


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    return verdict(groups(results, measure_of(results)))


def report(results: Results, config: Config) -> str:
    """A line for each condition, the paired differences from the controls, and the test of the trait matrix."""
    measure = measure_of(results)
    found = groups(results, measure)
    lines = [measure.header(results), *_lines(found)]
    for metric, label in BESIDE[measure].items():
        if values := of_conditions(results, metric):
            lines += [label, *_lines(values, ".2g" if metric == "probability" else ".3f")]
    lines += costs(results)
    lines.append(f"students less their controls ({measure.metric}), paired by trait and {results.replica}")
    for (student, control), difference in differences(found).items():
        lines.append(f"  {student:15} less {control:15} {difference}: {told(difference)}")
    if len(config.trait_names()) > 1:
        for condition in ("student_masked", "student", "student_soft"):
            if condition in found:
                matrices = trait_matrices(results, condition, measure)
                # Seeds of a checkpoint share its weights, and nearly its teachers: they are one group.
                matrix = matrix_test(matrices.mean(0, keepdims=True) if config.checkpoint else matrices)
                lines.append(
                    f"{condition}: diagonal less rest {matrix.statistic:.3f}, permutation p = {matrix.p:.2g}"
                )
    return "\n".join([*lines, verdict(found)])


def _lines(found: Groups, form: str = ".3f") -> list[str]:
    return [f"  {name:15} {interval(values):{form}}" for name, values in found.items()]


def costs(results: Results) -> list[str]:
    """The costs of teachers, one line for each measure. Reasons that rejected no answer are left out."""
    reasons = [metric for metric in results.distinct("metric") if metric.startswith(REJECTED)]
    lines = []
    for teacher in WRITERS:
        for name, label in [*COSTS.items(), *((metric, f"of its answers {metric}") for metric in reasons)]:
            values = results.values(condition=teacher, metric=name)
            if any(values) or (values and name in COSTS):
                lines.append(f"  {teacher:15} {interval(values)} {label}")
        needed, read = (results.values(condition=teacher, metric=f"tokens_{name}") for name in ("needed", "read"))
        if needed:
            short = int(np.sum(np.array(read) < np.array(needed)))
            lines.append(
                f"  {teacher:15} {np.median(read):.0f} tokens in its rows, {np.median(needed):.0f} needed by a "
                f"student of sampled tokens (medians); too few in {short} of {len(needed)} runs"
            )
    return lines


def color(name: str, found: Groups) -> str:
    """Blue for base and teachers, green for students above the base, gray for other students."""
    if name in ("base", *WRITERS):
        return COLORS[0]
    return COLORS[2] if told(paired_difference(found[name], found["base"])) == "more" else "#999999"


def plot(results: Results, config: Config) -> Figure:
    """A bar for each condition."""
    figure, ((axes,),) = panels(size=(9.5, 3.8))
    measure = measure_of(results)
    found = groups(results, measure)
    for x, (name, values) in enumerate(found.items()):
        bar(axes, x, values, color(name, found), width=0.6)
    axes.set_xticks(range(len(found)), [LABELS[name] for name in found], fontsize=6.5)
    axes.axhline(interval(found["base"]).mean, color="grey", linestyle=":", linewidth=1)
    axes.set_ylabel(measure.label)
    axes.set_ylim(0, 1.1)
    axes.set_title(verdict(found))
    note(
        axes,
        f"bars: {drawn(found['base'])}; dotted: base\n"
        "green: paired difference from the base is above 0; gray: it is not, or cannot be told",
    )
    return figure
