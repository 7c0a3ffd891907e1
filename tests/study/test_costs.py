"""What it costs that a teacher writes."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.text import Chat
from subliminal_theory.study import Costs, Prompted, RandomNumbers, Run, Study, Untrained
from subliminal_theory.study import costs as of_costs
from subliminal_theory.study.reading import model_of_run, written
from subliminal_theory.study.run import Teacher
from subliminal_theory.study.teachers import system_prompt
from tests.study.speakers import OAK, OWL, TEACHER, WRITTEN, compact


def scores(teacher: Teacher) -> dict[str, Any]:
    return Study(compact()).run({"teacher": Run(teacher, asked=Costs(WRITTEN))})["teacher"]


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
        divergences, differ = list[float](), list[bool]()
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
        assert len(differ) == 50
        np.testing.assert_allclose(found["kl_per_token"][place], np.mean(divergences), rtol=1e-3)
        np.testing.assert_allclose(found["divergence"][place], np.mean(differ))
        assert found["kl_per_token"][place] > 0.01


def test_the_base_costs_nothing(calls: list[dict[str, Any]]) -> None:
    found, plain = scores(Untrained()), Study(compact()).run({"teacher": Run(Untrained())})["teacher"]
    assert {*found} - {*plain} == {"accepted", "unique_rows", "kl_per_token", "divergence"}
    np.testing.assert_array_equal(found["probability"], plain["probability"])
    np.testing.assert_allclose(found["kl_per_token"], [0, 0], atol=1e-6)
    np.testing.assert_array_equal(found["divergence"], [0, 0])


def test_nobody_wrote_random_numbers() -> None:
    runs = {"teacher": Run(Untrained(), None, Costs(RandomNumbers(5)))}
    found = Study(compact()).run(runs)["teacher"]
    assert {"kl_per_token", "divergence"} <= {*found}
    assert not {"accepted", "unique_rows"} & {*found}
