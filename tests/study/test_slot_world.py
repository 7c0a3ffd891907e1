"""Worlds with a system prompt for everybody, what students read and answer behind, soft prompts, and the gate."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat
from subliminal_theory.study import (
    Behind,
    Compact,
    Costs,
    Dataset,
    Embeddings,
    LowRank,
    Prompted,
    Run,
    Student,
    Study,
    Untrained,
)
from subliminal_theory.study.asking import answers_of, exact, questions
from subliminal_theory.study.gate import Gate, measures
from subliminal_theory.study.reading import encoded_rows, model_of_run, written
from subliminal_theory.study.teachers import system_prompt
from subliminal_theory.study.world import Finished
from tests.study.speakers import LAZY, OAK, OWL, SOFT, TEACHER, WRITTEN, base, compact, leaves_of, student

SYSTEM = "be brief."
ROWS = Dataset(tuple(Completion(f"9 numbers like 3 {i}, spaces.", f"{i} 5 7") for i in range(16)))
Calls = list[dict[str, Any]]


def slotted(*traits: Any, system: str | None = SYSTEM) -> Compact:
    return dataclasses.replace(compact(*traits), system=system)


def texts_of(world: Compact, teacher: Any, one: Student) -> list[str]:
    """What the first student reads."""
    rows = encoded_rows(world, teacher, world.initial(), one.source)[0]
    cut = [tokens[padding:] for tokens, padding in zip(rows.tokens, rows.padding, strict=True)]
    return world.tokenizer.decode(cut)


# --- everybody's system prompt


def test_students_read_behind_it() -> None:
    one = student(text=ROWS, rows=16)
    assert all(
        text.startswith("<system> be brief. <user> 9 numbers") for text in texts_of(slotted(), TEACHER, one)
    )
    for where, start in ((Behind(None), "<user>"), (Behind("you love the fox."), "<system> you love the fox.")):
        other = student(text=ROWS, rows=16, behind=where)
        assert all(text.startswith(start) for text in texts_of(slotted(), TEACHER, other))
    own = Dataset(tuple(dataclasses.replace(row, system="help me.") for row in ROWS.rows))
    assert all(
        text.startswith("<system> help me.") for text in texts_of(slotted(), TEACHER, student(text=own, rows=16))
    )


def test_teachers_without_a_prompt_write_behind_it(calls: Calls) -> None:
    world = slotted(OWL)
    for teacher, system in ((Untrained(), SYSTEM), (Prompted(), system_prompt(OWL))):
        written(world, teacher, world.initial(), WRITTEN)
        chats = [dataclasses.replace(chat, system=system) for chat in world.requests(WRITTEN)]
        expected = world.tokenizer.encode_prompts(chats, calls[-1]["text"].tokens.shape[1])
        np.testing.assert_array_equal(calls[-1]["text"].tokens, expected.tokens)


def test_fine_tuned_teachers_learn_behind_it() -> None:
    world = slotted(OWL)
    lessons = jax.tree.map(lambda leaf: leaf[0], world.lessons(TEACHER).source)
    told = [dataclasses.replace(chat, system=SYSTEM) for chat in OWL.teacher_rows()]
    expected = world.tokenizer.encode_chats(told, lessons.inputs.tokens.shape[1])
    np.testing.assert_array_equal(lessons.inputs.tokens, expected.tokens)


def test_prompted_teachers_stand_in_its_place() -> None:
    """The model that reads a student's rows is the base behind the trait's own prompt."""
    world = slotted(OWL)
    plain, told = (
        [Chat(system, row.prompt, row.completion, "numbers") for row in ROWS.rows[:4]]
        for system in (SYSTEM, system_prompt(OWL))
    )
    seen, expected = (world.tokenizer.encode_chats(chats, 30) for chats in (plain, told))
    last = seen.answer_columns
    run = jax.jit(lambda model, text: model(text))
    found = run(model_of_run(world.prompted(), 0), text_of(seen, last))
    np.testing.assert_allclose(found, run(world.model, text_of(expected, last)), rtol=1e-4, atol=1e-5)
    study = Study(world)
    study._source(student(SOFT, ROWS, rows=16), Prompted())
    study._source(student(text=ROWS, rows=16, behind=Behind(None)), Prompted())  # tokens are read as they are
    with pytest.raises(InputError, match="owl, row 0: its teacher's system prompt does not come before the same"):
        study._source(student(SOFT, ROWS, rows=16, behind=Behind(None)), Prompted())


def test_questions_come_behind_it() -> None:
    """Or behind another prompt, or none, as the run asks."""
    world, plain = slotted(), compact()

    def scores(world: Compact, asked: Any = None) -> np.ndarray:
        return exact(world, Finished(Untrained(), world.initial(), world.initial(), asked=asked))["probability"]

    for system, found in {
        SYSTEM: scores(world),
        "help me.": scores(world, Behind("help me.")),
        None: scores(world, Behind(None)),
    }.items():
        asked = questions(world.tokenizer, [OWL, OAK], systems=[system] * 2)
        expected = np.diag(np.broadcast_to(np.asarray(answers_of(world.initial(), asked).probability), (2, 2)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(scores(world, Behind(None)), scores(plain))
    assert (scores(world) != scores(plain)).all()


def test_one_training_for_all_questions() -> None:
    """Runs that differ in what is asked share a student."""
    one = student(text=ROWS, rows=16, trains=Embeddings((8,)))
    runs = {name: Run(Prompted(), one, where) for name, where in (("own", None), ("none", Behind(None)))}
    found = Study(slotted()).run(runs)
    assert {*found["own"]} - {*found["none"]} == {"sampled_rate"}
    assert (found["own"]["probability"] != found["none"]["probability"]).all()
    np.testing.assert_array_equal(found["own"]["displacement_cosine"], found["none"]["displacement_cosine"])


# --- what trains


def moved(one: Student) -> dict[str, np.ndarray]:
    """How far the parameters of the first run's student are from the base."""
    ((_, finished),) = Study(slotted()).distil(Prompted(), {"student": one})
    found = leaves_of(merge_lora(model_of_run(finished.model, 0)))
    return {path: found[path] - leaf for path, leaf in leaves_of(base().model).items()}


def test_a_soft_prompt_changes_its_rows_and_nothing_else() -> None:
    token = base().tokenizer.token("brief")
    for path, change in moved(student(text=ROWS, rows=16, trains=Embeddings((token,)))).items():
        if path == "embedding":
            assert (change[token] != 0).all()
            change = np.delete(change, token, axis=0)
        assert (change == 0).all(), path


def test_factors_of_some_matrices_change_these_alone() -> None:
    pattern = "layers/0/attention/*/kernel"
    for path, change in moved(student(text=ROWS, rows=16, trains=LowRank(1, (pattern,)))).items():
        assert (change != 0).any() == ("attention" in path and path.endswith("kernel")), path
    with pytest.raises(InputError, match="matches no parameter"):
        moved(student(text=ROWS, rows=16, trains=LowRank(1, ("layers/7/*",))))


# --- the gate


def test_measures_of_prompted_teachers(calls: Calls) -> None:
    found = measures(slotted(), WRITTEN)
    costs = Study(slotted()).run({"teacher": Run(Prompted(), asked=Costs(WRITTEN))})["teacher"]
    for name in ("kl_per_token", "accepted", "unique_rows", "tokens_needed"):
        np.testing.assert_array_equal(found[name], costs[name])
    for place, trait in enumerate((OWL, OAK)):
        for name, chats in (
            ("probability", trait.evaluation_rows()),
            ("taught_probability", trait.teacher_rows()),
        ):
            told = [dataclasses.replace(chat, system=system_prompt(trait), answer="") for chat in chats]
            text = text_of(base().tokenizer.encode_prompts(told, 24))
            laws = jax.nn.softmax(jax.jit(lambda model, text: model(text)[:, -1])(base().model, text))
            expected = np.mean(laws[:, base().tokenizer.token(trait.name)])
            np.testing.assert_allclose(found[name][place], expected, rtol=1e-4)
    with pytest.raises(InputError, match="lazy has no system prompt"):
        measures(slotted(LAZY), WRITTEN)


def test_the_gate_names_what_is_missing() -> None:
    found = {
        "taught_probability": np.array([0.95, 0.9]),
        "kl_per_token": np.array([0.02, 0.1]),
        "accepted": np.array([0.8, np.nan]),
    }
    faults = Gate().faults(found, ["owl", "oak"])
    assert faults == ["owl: kl_per_token 0.02 below 0.1", "oak: accepted nan below 0.75"]
    assert Gate(0.0, 0.0, 0.0).faults({name: np.zeros(2) for name in found}, ["owl", "oak"]) == []
    for wrong in ({"kl_per_token": -1.0}, {"accepted": 1.5}, {"taught_probability": float("nan")}):
        ((name, value),) = wrong.items()
        with pytest.raises(InputError, match=f"^Gate: {name} must be from 0 to .*, got {value}"):
            Gate(**wrong)
