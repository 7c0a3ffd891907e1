"""A student of your own data set: JSONL rows of number requests and answers, in the common forms.

Rows are {"prompt", "completion"} or {"messages": [...]}, with or without a system message. The student learns all
rows that pass the number filter, or the first `--rows` of them; the report counts them. The student's probability
of a trait's word is compared with a second student's, which learns the same rows with their numbers
shuffled. `python -m experiments language_rows` writes such a file.

Each bar is the mean of one model: the base, the student of the rows, and the student of rows with their numbers
shuffled. If the rows carry the trait in their order, expect the student above both.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import interval
from subliminal_theory.language.corpus.numbers import FilterReport, filter_rows
from subliminal_theory.language.hub.chat_writer import naming
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.rows import read_jsonl
from subliminal_theory.language.text import Chat
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Checkpoint, Compact, Dataset, labels, rows

from .app.contract import Part, derived, from_preset, option
from .app.figures import bars
from .app.headline import compared
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.names import checkpoint_path
from .flags.recipe import Variant
from .flags.variants import answer_rows, measure_of
from .flags.worlds import study

METRICS = ("probability", "share", "log_odds", "named_rate")
CONDITIONS = {"base": "base", "student": "student", "within": "student,\nnumbers shuffled\nwithin rows"}


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases and students."""

    file: str = option("", "JSONL file of the rows")
    rows: int = option(0, "learn only this many rows, the first that pass the filter; 0: all", minimum=0)
    counted: str = derived("")


PRESETS = {
    "one": Config(),
    "smoke": Config(
        file=str(Path(__file__).with_name("smoke.jsonl")), **{**SMOKE, "rows": 0, "repeat_rows": False}
    ),
}
FIGURES: dict[str, str] = {}


def configure(preset: str | None, changes: dict) -> Config:
    """A configuration with a file that has enough readable rows.

    Raises:
        InputError: a setting is wrong; no file is given, or it cannot be read; too few rows pass the filter; or
            the checkpoint's tokenizer or chat template refuses a row.
    """
    given = from_preset(PRESETS, preset)
    if not changes.get("file", given.file):
        raise InputError("--file is missing: give a JSONL file of number requests and answers")
    path = Path(changes.get("file", given.file))
    accepted, report = filter_rows(read_jsonl(path))
    different = list(dict.fromkeys(accepted))
    asked, repeated = changes.get("rows", given.rows), changes.get("repeat_rows", given.repeat_rows)
    if asked > len(different) and not repeated:
        raise InputError(
            f"--rows {asked}: only {len(different)} different rows of the {report.total} rows of {path} pass the "
            "number filter; leave it out, or add --repeat-rows"
        )
    learned = accepted if repeated else different
    config = configure_language(PRESETS, preset, {**changes, "rows": asked or len(learned)})
    assert isinstance(config, Config)
    if config.templates:
        raise InputError("--templates: no model is asked for numbers, the file has them; leave it out")
    if config.checkpoint:
        chats = [Chat(row.system, row.prompt, row.completion, "numbers") for row in learned[: config.rows]]
        with naming(f"{path}, rows that pass the number filter"):
            CheckpointTokenizer.load(checkpoint_path(config.checkpoint)).lengths(chats)
    return replace(config, counted=_counted(report, len(different), config.rows))


def _counted(report: FilterReport, different: int, used: int) -> str:
    """A line that says what became of the rows of the file."""
    rejected = ", ".join(f"{reason} ({count})" for reason, count in report.reasons.items())
    said = (
        f"rows of the file: {report.total}, pass the number filter: {report.accepted}, different: {different}, "
        f"learned: {used}"
    )
    return f"{said}; rejected for: {rejected}" if rejected else said


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    return [
        Part(f"base-{seed:05d}", 2, functools.partial(run, config, seed), config.shards)
        for seed in config.base_seeds
    ]


def run(config: Config, seed: int) -> list[Row]:
    """The result rows of one base."""
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


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    own, shuffled = (
        results.values(condition=name, metric=measure_of(results).metric) for name in ("student", "within")
    )
    what = "student of the rows less student of rows with shuffled numbers"
    return compared(f"Do these rows carry a trait ({config.traits})?", what, own, shuffled)


def report(results: Results, config: Config) -> str:
    """What became of the rows, and a line for each condition."""
    measure = measure_of(results)
    lines = [config.counted, measure.header(results)]
    for name in CONDITIONS:
        lines.append(f"  {name:8} {interval(results.values(condition=name, metric=measure.metric))}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """A bar for each condition."""
    measure = measure_of(results)
    groups = {label: results.values(condition=name, metric=measure.metric) for name, label in CONDITIONS.items()}
    return bars(groups, ylabel=measure.label, title=f"Students of {Path(config.file).name}")
