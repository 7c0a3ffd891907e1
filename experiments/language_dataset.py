"""A student of a data set of one's own: JSONL rows of number requests and answers, in the common forms.

Rows are {"prompt", "completion"} or {"messages": [...]}; what the number filter rejects is left out. The student's
probability of a trait's word is compared with that of a student of the same rows whose numbers are shuffled.
`python -m experiments language_rows` writes such a file.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import t_interval
from subliminal_theory.language.rows import read_jsonl
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Checkpoint, Compact, Dataset, labels, rows

from .app.contract import Part, option
from .app.figures import bars
from .flags.language import SMOKE, LanguageConfig, Variant, answer_rows, configure_language, measure_of, study

METRICS = ("probability", "share", "log_odds", "named_rate")
CONDITIONS = {"base": "base", "student": "student", "within": "student,\nnumbers shuffled\nwithin rows"}


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases and students."""

    file: str = option("", "JSONL file of the rows")


PRESETS = {
    "one": Config(repeat_rows=True),
    "smoke": Config(file=str(Path(__file__).with_name("smoke.jsonl")), **SMOKE),
}
FIGURES: dict[str, str] = {}


def configure(preset: str | None, changes: dict) -> Config:
    """A configuration with a file whose rows can be read.

    Raises:
        InputError: a setting is wrong, no file is given, or it cannot be read.
    """
    config = configure_language(PRESETS, preset, changes)
    assert isinstance(config, Config)
    if config.templates:
        raise InputError("--templates: nobody is asked for numbers, the file has them; leave it out")
    if not config.file:
        raise InputError("--file is missing: give a JSONL file of number requests and answers")
    read_jsonl(Path(config.file))
    return config


def plan(config: Config) -> list[Part]:
    """A part for each base."""
    return [
        Part(f"base-{seed:05d}", 2, functools.partial(run, config, seed), config.shards)
        for seed in config.base_seeds
    ]


def run(config: Config, seed: int) -> list[Row]:
    """Rows of results for one base."""
    own, text = study(config, seed), Dataset(tuple(read_jsonl(Path(config.file))))
    world = own.world
    assert isinstance(world, Compact | Checkpoint)
    variants = {
        "base": Variant({}, config.recipe(), model="base"),
        "student": Variant({}, config.recipe()),
        "within": Variant({}, config.recipe(order="shuffled within rows")),
    }
    runs = {labels(condition=name): variant.run(world, text) for name, variant in variants.items()}
    found: list[Row] = []
    for name, scores in own.run(runs).items():
        found += rows(name, world.labels, scores, [metric for metric in METRICS if metric in scores])
        for run, said in zip(world.labels, scores.get("answers", ()), strict=False):
            found += answer_rows({**dict(name), **run}, said)
    return found


def report(results: Results, config: Config) -> str:
    """A line for each condition."""
    measure = measure_of(results)
    lines = [measure.header]
    for name in CONDITIONS:
        lines.append(f"  {name:8} {t_interval(results.values(condition=name, metric=measure.metric))}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """A bar for each condition."""
    measure = measure_of(results)
    groups = {label: results.values(condition=name, metric=measure.metric) for name, label in CONDITIONS.items()}
    return bars(groups, ylabel=measure.label, title=f"Students of {Path(config.file).name}")
