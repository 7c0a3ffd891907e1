"""A language model that learns a preference from number sequences, and the controls that do not.

A small chat model is pre-trained from nothing; a teacher gets a trait (it loves owls), by fine-tuning or by a
system prompt, and writes nothing but numbers; a student of the same base, trained on those numbers alone, then
names the owl when asked for its favourite animal. A student of another base, of a teacher without trait, or of the
same numbers in another order does not. (doi 10.1038/s41586-026-10319-8, main text.)
"""

import dataclasses
import functools
from dataclasses import dataclass

from matplotlib.figure import Figure

from subliminal_theory.estimate import matrix_test, paired_difference, t_interval
from subliminal_theory.language.corpus.traits import Preference, load_trait
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLOURS, bar, note, panels
from .flags.language import (
    HEADER,
    SMOKE,
    LanguageConfig,
    Variant,
    configure_language,
    trait_matrices,
    variant_parts,
)

LABELS = {
    "base": "base",
    "teacher": "teacher",
    "student_soft": "student, full\ndistribution",
    "student": "student,\nsampled",
    "prompted": "student of\nprompted\nteacher",
    "prefixed": "student,\nnumbers\nin front",
    "others": "other\ntraits'\nstudents",
    "regular": "regular\nnumbers",
    "within": "shuffled\nin rows",
    "across": "shuffled\nacross rows",
    "in_context": "numbers in\ncontext",
    "cross": "other base,\nsampled",
    "cross_soft": "other base,\nfull distr.",
}

CONTROLS = ("base", "others", "regular", "within", "across", "cross")


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases, teachers and students."""

    rows: int = option(4096, "accepted answers that a student learns", minimum=1)
    steps: int = option(125, "steps of a student", minimum=1)


# The paper's setting for open weights: 3 epochs of 10,000 rows.
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
    "one": Config(),
    "full": Config(traits="owl,wolf,cat,fox,oak,maple,pine,elm", seeds=6, rows=8192, steps=250),
    "smoke": Config(**SMOKE),
    "open-weights": OPEN_WEIGHTS,
    # Ranks, rates and numbers of rows at which more transfer was reported (lawrencefeng17, a repository's report).
    "open-weights-rank-2": dataclasses.replace(OPEN_WEIGHTS, rank=2, rate=8e-4),
    "open-weights-more-rows": dataclasses.replace(
        OPEN_WEIGHTS, requests=77_400, rows=25_800, steps=1173, rate=4e-4
    ),
}
configure = functools.partial(configure_language, PRESETS)


def variants(config: Config) -> list[Variant]:
    """The conditions of the experiment."""
    sampled, soft = config.recipe(), config.recipe(channel="soft")
    found = [
        Variant({"condition": "base"}, sampled, model="base"),
        Variant({"condition": "teacher"}, sampled, model="teacher"),
        Variant({"condition": "student_soft"}, soft, matrix=True),
        Variant({"condition": "student"}, sampled, matrix=True),
        Variant({"condition": "prefixed"}, sampled, prefixed=True),
        Variant({"condition": "regular"}, config.recipe(teacher="untrained")),
        Variant({"condition": "within"}, config.recipe(order="shuffled within rows")),
        Variant({"condition": "across"}, config.recipe(order="shuffled across rows")),
        Variant({"condition": "in_context"}, sampled, model="base", prefixed=True),
        Variant({"condition": "cross"}, sampled, start="other"),
        Variant({"condition": "cross_soft"}, soft, start="other"),
    ]
    if config.checkpoint and not config.other_checkpoint:
        found = [variant for variant in found if variant.start == "own"]
    if all(isinstance(load_trait(name), Preference) for name in config.trait_names()):
        found.insert(4, Variant({"condition": "prompted"}, config.recipe(teacher="prompted")))
    return found


def plan(config: Config) -> list[Part]:
    """A part for each base."""
    return variant_parts(config, variants(config))


def groups(results: Results) -> dict[str, list[float]]:
    """The probability of the trait's word in every run, by condition."""
    found = {name: results.values(condition=name, metric="probability") for name in LABELS}
    found["others"] = results.values(condition="student", metric="others")
    return {name: values for name, values in found.items() if values}


def report(results: Results, config: Config) -> str:
    """A line for each condition, the paired differences from the controls, and whether traits are told apart."""
    found = groups(results)
    lines = [HEADER]
    lines += [f"  {name:13} {t_interval(values)}" for name, values in found.items()]
    lines.append("student less, paired")
    lines += [
        f"  {name:13} {paired_difference(found['student'], found[name])}" for name in CONTROLS if name in found
    ]
    if len(config.trait_names()) > 1:
        for condition in ("student", "student_soft"):
            matrix = matrix_test(trait_matrices(results, condition))
            lines.append(f"{condition}: diagonal less rest {matrix.statistic:.3f}, permutation p = {matrix.p:.2g}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """A bar for each condition."""
    figure, ((axes,),) = panels(size=(9.5, 3.8))
    found = groups(results)
    for x, (name, values) in enumerate(found.items()):
        colour = COLOURS[0 if name in ("base", "teacher") else 2 if "student" in LABELS[name].split(",")[0] else 7]
        bar(axes, x, values, COLOURS[4] if name == "others" else colour, width=0.6)
    axes.set_xticks(range(len(found)), [LABELS[name] for name in found], fontsize=6.5)
    axes.axhline(t_interval(found["base"]).mean, color="grey", linestyle=":", linewidth=1)
    axes.set_ylabel("probability of the trait's word")
    axes.set_ylim(0, 1.1)
    axes.set_title("A preference passes through number sequences, to a student of the same base")
    traits = len(config.trait_names())
    note(
        axes,
        f"bars: mean of {traits} traits x {config.seeds} bases; whiskers: 95% t interval over these runs; "
        "dots: single runs; dotted: base",
    )
    return figure
