"""What it costs that a teacher writes."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.corpus.numbers import REASONS, FilterReport
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat
from subliminal_theory.study import Costs, Prompted, RandomNumbers, Run, Study, Untrained
from subliminal_theory.study import costs as of_costs
from subliminal_theory.study.reading import model_of_run, written
from subliminal_theory.study.run import Teacher
from subliminal_theory.study.speaker import hidden_words
from subliminal_theory.study.teachers import system_prompt
from subliminal_theory.study.world import Finished
from tests.study.speakers import OAK, OWL, TEACHER, WRITTEN, compact

REJECTED = [f"rejected: {reason}" for reason in REASONS]


def scores(teacher: Teacher) -> dict[str, Any]:
    return Study(compact()).run({"teacher": Run(teacher, asked=Costs(WRITTEN))})["teacher"]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [TEACHER, Prompted()])
def test_costs(calls: list[dict[str, Any]], teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against logits of the rows one by one, each as wide as it is."""
    monkeypatch.setattr(of_costs, "MOST", 5)
    found, taught, run = (
        scores(teacher),
        Study(compact()).teacher(teacher),
        jax.jit(lambda model, text: model(text)),
    )
    kept = written(compact(), teacher, taught, WRITTEN)
    for place, (trait, (rows, report)) in enumerate(zip((OWL, OAK), kept, strict=True)):
        assert found["accepted"][place] == report.accepted / 32
        assert found["unique_rows"][place] == len(rows) == report.accepted
        divergences, differ, within = list[float](), list[bool](), list[float]()
        for row in rows[:5]:
            plain = Chat(None, row.prompt, row.completion, "numbers")
            told = dataclasses.replace(plain, system=system_prompt(trait)) if teacher == Prompted() else plain
            laws = []
            for model, chat in ((model_of_run(taught, place), told), (compact().model, plain)):
                encoded = compact().tokenizer.encode_chats([chat], 45)
                logits = np.asarray(run(model, text_of(encoded))[0], float)[encoded.weights[0] > 0]
                laws.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
            divergences += list(np.sum(laws[0] * np.log(laws[0] / laws[1]), axis=-1))
            differ += list(laws[0].argmax(-1) != laws[1].argmax(-1))
            shown = [np.delete(law, hidden_words(compact().tokenizer, (OWL, OAK)), axis=-1) for law in laws]
            shown = [law / law.sum(-1, keepdims=True) for law in shown]
            within += list(np.sum(shown[0] * np.log(shown[0] / shown[1]), axis=-1))
        assert len(differ) == 50
        np.testing.assert_allclose(found["kl_per_token"][place], np.mean(divergences), rtol=1e-3)
        np.testing.assert_allclose(found["divergence"][place], np.mean(differ))
        assert found["kl_per_token"][place] > 0.01
        np.testing.assert_allclose(found["visible_kl_per_token"][place], np.mean(within), rtol=1e-3)
        assert found["tokens_read"][place] == 10 * len(rows)  # nine numbers and the end
        np.testing.assert_allclose(found["tokens_needed"][place], 1.96**2 / 2 / np.mean(divergences), rtol=1e-3)


@pytest.mark.slow
def test_the_base_costs_nothing(calls: list[dict[str, Any]]) -> None:
    found, plain = scores(Untrained()), Study(compact()).run({"teacher": Run(Untrained())})["teacher"]
    told = {"accepted", "unique_rows", "kl_per_token", "visible_kl_per_token", "divergence"}
    assert {*found} - {*plain} == {*told, "tokens_needed", "tokens_read", *REJECTED}
    assert (found["tokens_needed"] > 1e6).all()
    assert np.isfinite(found["tokens_needed"]).all()
    (other,) = (metric for metric in REJECTED if "something besides" in metric)  # a word among numbers
    np.testing.assert_allclose(found[other], 1 - found["accepted"])
    assert (found[other] > 0).all()
    np.testing.assert_array_equal(found["probability"], plain["probability"])
    np.testing.assert_allclose(found["kl_per_token"], [0, 0], atol=1e-6)
    np.testing.assert_array_equal(found["divergence"], [0, 0])


def test_rejections_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs have the same metrics, also where they are scored apart; reasons that did not occur are 0."""
    rows, counts = (
        [Completion("continue: 1, 2", "1 2")],
        ({"no number": 3, "more than 10 numbers": 5}, {"no number": 1}),
    )

    def kept(world: Any, *given: Any) -> list[tuple[list[Completion], FilterReport]]:
        reports = (FilterReport(2, 10, count) for count in counts)
        return [(rows, report) for report in reports][world.first_run :][: len(world.traits)]

    monkeypatch.setattr(of_costs, "written", kept)
    monkeypatch.setattr(of_costs, "_compared", lambda *given: {"kl_per_token": 0.0})
    world, finished = compact(), Finished(Untrained(), compact().initial(), compact().initial())
    together = of_costs.costs(world, finished, WRITTEN)
    expected = {"rejected: no number": [0.3, 0.1], "rejected: more than 10 numbers": [0.5, 0.0]}
    for metric in REJECTED:
        np.testing.assert_array_equal(together[metric], expected.get(metric, [0.0, 0.0]))
    for run in range(2):
        apart = of_costs.costs(world.at(run), finished, WRITTEN)
        assert apart == {metric: values[run : run + 1] for metric, values in together.items()}


def test_nobody_wrote_random_numbers() -> None:
    runs = {"teacher": Run(Untrained(), None, Costs(RandomNumbers(5)))}
    found = Study(compact()).run(runs)["teacher"]
    assert {"kl_per_token", "divergence"} <= {*found}
    assert not {"accepted", "unique_rows", *REJECTED} & {*found}
