"""From variants of a recipe to result rows, and what is reported about a trait's word."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import method
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Study, labels, rows

from ..app.contract import Part
from .language import LanguageConfig
from .recipe import Variant, World
from .worlds import study


@dataclass(frozen=True)
class Measure:
    """What is reported about a trait's word.

    Attributes:
        metric: the metric for a run's own word.
        others: the metric for the same word in the runs with other traits.
        asked: the metric for the words of all traits.
        label: a description for figures and reports.
    """

    metric: str
    others: str
    asked: str
    label: str

    def header(self, results: Results) -> str:
        """The first line of a report."""
        return f"{self.label} on held-out questions, mean and {method(results.values(metric=self.metric))}"


PROBABILITY = Measure("probability", "others", "probability_asked", "probability of the trait's word")
SHARE = Measure("share", "others_share", "share_asked", "probability of the trait's word among its rivals")
LOG_ODDS = Measure(
    "log_odds", "others_log_odds", "log_odds_asked", "log odds of the trait's word among its rivals"
)
MEASURES = (PROBABILITY, SHARE, LOG_ODDS)
TINY = 1e-3


def measure_of(results: Results, condition: str = "base") -> Measure:
    """The probability, or the share if the mean probability of a condition (by default the base) is below `TINY`.

    A checkpoint rarely begins an answer with the name itself, so its preference shows only among the names.
    """
    base = results.values(condition=condition, metric="probability")
    tiny = bool(base) and np.mean(base) < TINY
    return SHARE if tiny and results.values(condition=condition, metric="share") else PROBABILITY


def variant_parts(
    config: LanguageConfig, variants: Sequence[Variant], group: str = "", *, wrap: bool = False
) -> list[Part]:
    """One part for each base, with all traits and variants.

    Raises:
        InputError: there is no variant.
    """
    if not variants:
        raise InputError("there is nothing to run: no variant is left")
    return [
        Part(
            f"{group}base-{seed:05d}",
            len(variants),
            functools.partial(run_variants, config, variants, seed, wrap),
            config.shards,
        )
        for seed in config.base_seeds
    ]


def run_variants(config: LanguageConfig, variants: Sequence[Variant], seed: int, wrap: bool = False) -> list[Row]:
    """The result rows of all traits for one base.

    The metrics are those of the world's score and, for each measure, `others`: the measure of this run's word,
    averaged over the runs with other traits. Rows with an `answer` hold what a checkpoint said.
    """
    return variant_rows(study(config, seed, wrap), variants)


def variant_rows(own: Study, variants: Sequence[Variant]) -> list[Row]:
    """The result rows of all variants and traits of a study; see `run_variants`."""
    assert isinstance(own.world, World)
    runs = {labels(**variant.labels): variant.run(own.world) for variant in variants}
    found: list[Row] = []
    for variant, (name, scores) in zip(variants, own.run(runs).items(), strict=True):
        asked = {measure: scores.pop(measure.asked) for measure in MEASURES if measure.asked in scores}
        said = scores.pop("answers", None)
        for measure, values in asked.items():
            if len(values) > 1:
                others = [np.delete(values[:, run], run).mean() for run in range(len(values))]
                scores[measure.others] = np.array(others)
        for place, run in enumerate(own.world.labels):
            row = {**dict(name), **run}
            found += rows(name, [run], {metric: values[place : place + 1] for metric, values in scores.items()})
            for measure, values in asked.items() if variant.matrix else ():
                found += [
                    {**row, "asked": trait, "metric": measure.asked, "value": float(value)}
                    for trait, value in zip((t.name for t in own.world.asked), values[place], strict=True)
                ]
            if said is not None:
                found += answer_rows(row, said[place])
    return found


def answer_rows(row: Row, said: Sequence[tuple[str, str]]) -> list[Row]:
    """The questions and answers of a run with its labels, for answers.jsonl."""
    return [{**row, "question": question, "answer": answer} for question, answer in said]


def trait_matrices(results: Results, condition: str, measure: Measure = PROBABILITY) -> np.ndarray:
    """A measure, by default the probability, as [bases, traits of the students, traits asked for]."""
    traits, seeds = results.distinct("trait"), results.distinct("seed")
    wanted = {"condition": condition, "metric": measure.asked}
    values = [results.values(**wanted, seed=s, trait=t, asked=a) for s in seeds for t in traits for a in traits]
    return np.array(values).reshape(len(seeds), len(traits), len(traits))
