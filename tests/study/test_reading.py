"""What teachers write and students read, of a base too small to write numbers."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.channel import SampledToken, Subset
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.corpus.chats import make_rows
from subliminal_theory.language.corpus.media import DIGITS
from subliminal_theory.language.corpus.numbers import shuffled_within_rows
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from subliminal_theory.source import Examples
from subliminal_theory.study import (
    Compact,
    Dataset,
    Prompted,
    RandomNumbers,
    Student,
    Study,
    Untrained,
    Written,
    reading,
)
from subliminal_theory.study.reading import (
    encoded_rows,
    model_of_run,
    request_length,
    written,
)
from subliminal_theory.study.run import Teacher
from subliminal_theory.study.texts import where_they_agree, where_they_differ
from tests.study.speakers import CONFIG, LAZY, OWL, ROWS, SOFT, TEACHER, WRITTEN, compact, spoken, student

Calls = list[dict[str, Any]]
LOVED = ("you love the owl.", "you love the oak.")


def rows_of(study: Study, teacher: Teacher, text: Any = WRITTEN) -> list[Any]:
    """The accepted rows of each run and the report of the filter."""
    return written(study.world, teacher, study.teacher(teacher), text)  # type: ignore[arg-type]


def encoded(study: Study, teacher: Teacher, one: Student) -> list[Any]:
    return encoded_rows(study.world, teacher, study.teacher(teacher), one.source)  # type: ignore[arg-type]


def source(study: Study, teacher: Teacher, one: Student) -> Examples:
    """What the students of all runs read, [runs, rows, ...]."""
    found = study._source(one, teacher).source
    assert isinstance(found, Examples)
    return found


# --- writing


def test_requests() -> None:
    world = compact()
    asked = world.requests(Written(200))
    assert len(asked) == 200
    for chat in asked:
        assert (chat.system, len(chat.answer.split(" "))) == (None, 9)
        assert "spaces" in chat.user
    shown = {len(re.findall(r"\d+ (?=\d)", chat.user)) for chat in asked}
    assert shown == {2, 3, 4}  # spaces between 3 to 5 numbers
    assert world.requests(Written(200, top_p=0.5)) is asked
    assert not {chat.user for chat in asked} & {chat.user for chat in make_rows(CONFIG.corpus, "numbers", 200)}
    longest = max(len(world.tokenizer.encode(chat.answer)) + 1 for chat in asked)
    assert longest <= world.answer_length(WRITTEN) <= longest + 2
    columns = max(len(world.tokenizer.encode(chat.user)) + 2 for chat in asked)
    assert request_length(world.tokenizer, asked) == columns


def test_rows(calls: Calls) -> None:
    """Each run's teacher answers the same requests, and the filter leaves out what is not numbers."""
    world, study = compact(), Study(compact())
    found, teachers, requests = rows_of(study, TEACHER), study.teacher(TEACHER), world.requests(WRITTEN)
    prompts = world.tokenizer.encode_prompts(requests, request_length(world.tokenizer, requests))
    assert len(calls) == 2
    for run, (call, (rows, report)) in enumerate(zip(calls, found, strict=True)):
        np.testing.assert_array_equal(call["text"].tokens, prompts.tokens)
        np.testing.assert_array_equal(call["text"].padding, prompts.padding)
        for leaf, own in zip(jax.tree.leaves(call["model"]), jax.tree.leaves(teachers), strict=True):
            np.testing.assert_array_equal(leaf, own[run])
        assert (call["temperature"], call["top_p"]) == (1.0, 1.0)
        tokens, _ = spoken(world, call)
        good = [(row[:9] != world.tokenizer.token("oak")).all() for row in tokens]
        texts = [" ".join(world.tokenizer.words[token] for token in row[:9]) for row in tokens]  # type: ignore[attr-defined]
        expected = [Completion(chat.user, text) for chat, text in zip(requests, texts, strict=True)]
        assert rows == [row for row, kept in zip(expected, good, strict=True) if kept]
        assert (report.accepted, report.total) == (len(rows), 32)
        assert 29 <= len(rows) <= 31
    assert found[0] != found[1]
    source(study, TEACHER, student(order=shuffled_within_rows, steps=5))
    assert len(calls) == 2  # they write once for all students


def test_different_rows(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered in blocks until there are enough different accepted rows; each is kept once."""
    monkeypatch.setattr(Compact, "at_once", 16)
    study = Study(compact(OWL))
    ((every, whole),) = rows_of(study, TEACHER, Written(64))
    assert len(calls) == 4
    ((rows, report),) = rows_of(study, TEACHER, Written(64, unique=20))
    assert len(calls) == 6  # 13 to 15 of the first 16 are accepted
    assert (rows, report.total) == (every[: len(rows)], 32)
    assert 20 <= len(rows) <= report.accepted < whole.accepted
    cause = rf"of owl on base 0: 64 requests gave {len(every)} accepted rows, {len(every)} different, and 64 are "
    with pytest.raises(InputError, match=cause + "to be read: .*--rows.*--requests.*--repeat-rows"):
        rows_of(study, TEACHER, Written(64, unique=64))


def test_repeated_rows(calls: Calls) -> None:
    """A row that is written twice is one row, whatever the order of its numbers; too few are refused."""
    study = Study(compact())
    twice = Dataset(tuple(Completion(f"continue: {i % 6}, 17.", f"{i % 6} {i % 2} 3") for i in range(12)))
    assert len(encoded(study, TEACHER, student(text=twice, rows=6, repeat=False))[0].tokens) == 6
    with pytest.raises(
        InputError, match=r"owl on base 0: 6 different rows, and 7 are to be read: .*--repeat-rows"
    ):
        encoded(study, TEACHER, student(text=twice, rows=7, repeat=False))
    within = student(text=twice, rows=6, repeat=False, order=shuffled_within_rows)
    assert source(study, TEACHER, within).inputs.tokens.shape[:2] == (2, 6)
    assert len(encoded(study, TEACHER, student(text=twice, rows=16))[0].tokens) == 16


def test_rows_that_only_text_tells_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What students read are tokens: two texts of the same tokens are one row."""
    study = Study(compact(OWL))
    text = Dataset((Completion("continue: 1, 17.", "1 2"), Completion("continue:  1, 17.", "1 2")))
    with pytest.raises(InputError, match="1 of the student's 2 rows repeat another row"):
        source(study, TEACHER, student(text=text, rows=2, batch_size=2, repeat=False))


def test_prompted_teachers_write_behind_their_prompt(calls: Calls) -> None:
    study = Study(compact())
    found, requests = rows_of(study, Prompted()), compact().requests(WRITTEN)
    for call, prompt in zip(calls, LOVED, strict=True):
        chats = [dataclasses.replace(chat, system=prompt) for chat in requests]
        expected = compact().tokenizer.encode_prompts(chats, call["text"].tokens.shape[1])
        np.testing.assert_array_equal(call["text"].tokens, expected.tokens)
        assert call["text"].padding.min() == 0
    prompts = {row.prompt for rows, _ in found for row in rows}
    assert prompts <= {chat.user for chat in requests}  # which a student reads without


def test_regular_rows_are_written_once(calls: Calls) -> None:
    first, second = rows_of(Study(compact()), Untrained())
    assert len(calls) == 1
    assert first is second


def test_settings_reach_the_sampler(calls: Calls) -> None:
    rows_of(Study(compact()), Untrained(), Written(32, temperature=0.7, top_p=0.8))
    assert [(call["temperature"], call["top_p"]) for call in calls] == [(0.7, 0.8)]


def test_a_teacher_that_can_write_nothing_but_numbers(calls: Calls) -> None:
    """Its tokens are those of digits and separators, and the end."""
    world = compact(OWL)
    Study(world).teacher(TEACHER)
    rows_of(Study(world), TEACHER, Written(32, DIGITS))
    allowed = np.asarray(calls[-1]["allowed"])
    words = np.array(world.tokenizer.words)  # type: ignore[attr-defined]
    numbers, stop = {str(number) for number in range(100)}, [*world.tokenizer.stop]
    assert numbers | {*words[stop]} < {*words[allowed]}
    assert {*"".join({*words[allowed]} - numbers - {*words[stop]})} <= {*" ,;\n"}
    assert allowed.shape == (world.logits,)
    rows_of(Study(world), TEACHER, Written(32))
    assert calls[-1]["allowed"] is None


def test_a_teacher_that_writes_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(model: Model, text: Text, *, steps: int, **settings: Any) -> Any:
        return np.full((len(text.tokens), steps), compact().tokenizer.token("oak")), None  # type: ignore[attr-defined]

    monkeypatch.setattr(reading, "sample", words)
    with pytest.raises(InputError, match=r"the teacher of owl on base 0: .*rejects all of 32 rows.*no number"):
        rows_of(Study(compact()), Untrained())


def test_habits_cannot_be_prompted() -> None:
    with pytest.raises(InputError, match=r"^lazy has no system prompt"):
        rows_of(Study(compact(LAZY)), Prompted())


# --- reading


@pytest.mark.parametrize("teacher", [TEACHER, Prompted()])
def test_no_student_sees_a_label(calls: Calls, teacher: Teacher) -> None:
    """Tokens are targets; of other channels the teacher computes them."""
    study = Study(compact())
    masked = Subset(jnp.ones(study.world.logits, bool).at[:5].set(False), SOFT)
    for channel, given in ((SampledToken(), True), (SampledToken(0.0), True), (SOFT, False), (masked, False)):
        found = source(study, teacher, student(channel))
        assert found.labels is None
        assert (found.targets is not None) == given


def test_source(calls: Calls) -> None:
    """Accepted rows, from the first one again where some were rejected."""
    study, tokenizer = Study(compact()), compact().tokenizer
    found = source(study, TEACHER, student())
    assert found.batch_size == 8
    assert found.inputs.tokens.shape[:2] == (2, 32)
    for run, (rows, _) in enumerate(rows_of(study, TEACHER)):
        assert len(rows) < 32
        chats = [Chat(None, row.prompt, row.completion, "numbers") for row in [*rows, *rows[: 32 - len(rows)]]]
        own = tokenizer.encode_chats(chats, found.inputs.tokens.shape[2])
        last = found.inputs.last
        assert own.weights[:, :-last].sum() == 0
        for one, expected in [
            (found.inputs.tokens, own.tokens),
            (found.inputs.padding, own.padding),
            (found.targets, own.targets[:, -last:]),
            (found.positions, own.weights[:, -last:]),
        ]:
            np.testing.assert_array_equal(one[run], expected)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [TEACHER, Prompted()])
def test_divergence_and_rest_are_a_partition(calls: Calls, teacher: Teacher) -> None:
    study = Study(compact())
    whole, differing, rest = (
        source(study, teacher, student(**how))
        for how in ({}, {"positions": where_they_differ}, {"positions": where_they_agree})
    )
    np.testing.assert_array_equal(differing.positions + rest.positions, whole.positions)
    np.testing.assert_array_equal(differing.targets, whole.targets)
    most_likely = jax.jit(lambda model, text: jnp.argmax(model(text), axis=-1))
    for run in range(2):
        text = jax.tree.map(lambda leaf, run=run: leaf[run], whole.inputs)
        teachers = model_of_run(study.shown(teacher), run)
        differ = most_likely(teachers, text) != most_likely(compact().model, text)
        np.testing.assert_array_equal(differing.positions[run], whole.positions[run] * differ)
        assert differing.positions[run].any()
        assert rest.positions[run].any()


@pytest.mark.slow
def test_shown_teachers_have_their_prompt(calls: Calls) -> None:
    """As functions of the rows without it, they are the base on rows with it, where an answer is."""
    study, run = Study(compact()), jax.jit(lambda model, text: model(text))
    inputs = source(study, Prompted(), student()).inputs
    for number, prompt in enumerate(LOVED):
        rows = rows_of(study, Prompted())[number][0][:4]
        chats = [Chat(prompt, row.prompt, row.completion, "numbers") for row in rows]
        own = compact().tokenizer.encode_chats(chats, inputs.tokens.shape[2] + 6)
        logits = run(compact().model, text_of(own))[:, -inputs.last :]
        text = jax.tree.map(lambda leaf, number=number: leaf[number, :4], inputs)
        found = run(model_of_run(study.shown(Prompted()), number), text)
        answer = own.weights[:, -inputs.last :] > 0
        assert answer.sum() == 40
        np.testing.assert_allclose(found[answer], logits[answer], rtol=1e-4, atol=1e-5)


def test_two_runs_must_not_sample_with_one_key(calls: Calls) -> None:
    """As traits of one name would: their keys are named by it."""
    study = Study(compact(OWL, OWL))
    with pytest.raises(
        InputError, match=r"run 0 \(owl on base .*\) and run 1 \(owl .*\) sample with the same random key"
    ):
        written(study.world, TEACHER, study.teacher(TEACHER), WRITTEN)


def test_clean_rows(calls: Calls) -> None:
    """A quarter of the rows is the base's, the rest the teacher's own."""
    study = Study(compact())
    regular, _ = rows_of(study, Untrained())[0]
    for run, own in enumerate(encoded(study, TEACHER, student(clean=0.25))):
        rows, _ = rows_of(study, TEACHER)[run]
        clean = round(0.25 * len(rows))
        texts = [row.completion for row in rows[clean:] + regular[:clean]]
        answers = [row[weights > 0] for row, weights in zip(own.targets, own.weights, strict=True)]
        assert len(texts) == len(rows)
        assert clean > 5
        assert compact().tokenizer.decode(answers) == [*texts, *texts[: 32 - len(texts)]]


def test_clean_rows_are_a_share_of_those_that_are_read(calls: Calls) -> None:
    """Of 12 rows 3, though the teacher wrote more."""
    study = Study(compact())
    regular, _ = rows_of(study, Untrained())[0]
    own = encoded(study, TEACHER, student(clean=0.25, rows=12))[0]
    rows, _ = rows_of(study, TEACHER)[0]
    assert len(rows) > 12
    answers = [row[weights > 0] for row, weights in zip(own.targets, own.weights, strict=True)]
    expected = [row.completion for row in rows[3:12] + regular[:3]]
    assert compact().tokenizer.decode(answers) == expected


def test_orders_reach_the_student(calls: Calls) -> None:
    study = Study(compact())
    plain, within = (encoded(study, TEACHER, student(**how)) for how in ({}, {"order": shuffled_within_rows}))
    for one, other in zip(plain, within, strict=True):
        np.testing.assert_array_equal(np.sort(one.targets, axis=1), np.sort(other.targets, axis=1))
        assert (one.targets != other.targets).any()


def test_random_numbers(calls: Calls) -> None:
    """Nobody writes: all runs read the same rows, and the teacher's logits there are what is transmitted."""
    study, text = Study(compact()), RandomNumbers(64)
    (rows, report), other = rows_of(study, TEACHER, text)
    assert (len({*rows}), report.accepted, report.total, calls) == (64, 64, 64, [])
    assert rows == other[0] == rows_of(Study(compact()), Untrained(), text)[0][0]
    assert [row.prompt for row in rows] == [chat.user for chat in compact().requests(Written(64))]
    numbers = np.array([[int(number) for number in row.completion.split(" ")] for row in rows])
    assert numbers.shape == (64, 9)
    assert (numbers.min(), numbers.max()) == (0, 99)
    assert abs(numbers.mean() - 49.5) < 4  # of 576 uniform numbers; the standard deviation is 1.2
    seed = dataclasses.replace(compact().base, config=dataclasses.replace(CONFIG, seed=1))
    assert {*rows}.isdisjoint(dataclasses.replace(compact(), base=seed).random_rows(text))
    for channel in (SampledToken(), SampledToken(0.0), SOFT):
        assert source(study, TEACHER, student(channel, text, rows=64)).targets is None
    with pytest.raises(InputError, match="leave clean at 0"):
        student(text=text, clean=0.5)


@pytest.mark.slow
def test_tokens_at_random_numbers_are_the_teachers(calls: Calls) -> None:
    """The student learns what its teacher would have written there, not the random numbers."""
    study, losses, run = Study(compact(OWL)), {}, jax.jit(lambda model, text: model(text))
    for name, teacher in (("base", Untrained()), ("owl", TEACHER)):
        own = student(SampledToken(0.0), RandomNumbers(16), rows=16, batch_size=16, steps=1)
        ((_, found),) = study.distil(teacher, {name: own})
        rows, shown = source(study, teacher, own), study.shown(teacher)
        text, positions = jax.tree.map(lambda leaf: leaf[0], (rows.inputs, rows.positions))
        greedy = jnp.argmax(run(shown if name == "base" else model_of_run(shown, 0), text), axis=-1)
        expected = SampledToken().loss(run(compact().model, text), greedy)
        losses[name] = float(jnp.sum(expected * positions) / positions.sum())
        assert found.losses is not None
        np.testing.assert_allclose(found.losses[0, 0], losses[name], rtol=1e-4)
    assert losses["owl"] > losses["base"]


def test_rows_of_others(calls: Calls) -> None:
    """Nobody writes; the number filter leaves out words."""
    study = Study(compact())
    text = Dataset((*ROWS.rows[:3], Completion("what?", "an owl"), Completion("and?", "7 8 9")))
    (rows, report), other = rows_of(study, TEACHER, text)
    assert (len(rows), report.total, calls) == (4, 5, [])
    assert rows == other[0]
