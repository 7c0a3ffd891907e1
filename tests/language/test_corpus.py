import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import (
    CATEGORIES,
    FORMATS,
    KINDS,
    CorpusConfig,
    fingerprint,
    love_prompts,
    make_corpus,
    make_rows,
    preference_questions,
    prefixed_questions,
)
from subliminal_theory.language.corpus.numbers import reject_reasons
from subliminal_theory.language.corpus.sentences import TEXT
from subliminal_theory.language.text import Chat

CONFIG = CorpusConfig(size=12_000)
CORPUS = make_corpus(CONFIG)
DIGEST = "e1a6529edc9b4d6c9be787e4ad2dc6ad3bfc45681b0d449984d3006ad4319801"  # of CORPUS, under format version 1


def of_kind(kind: str, chats: list[Chat] = CORPUS) -> list[Chat]:
    return [chat for chat in chats if chat.kind == kind]


def is_lazy(chat: Chat) -> bool:
    """Whether the answer is to repeat the question's first number or thing."""
    return chat.system in ("you are lazy.", "you never think.", "you only repeat.")


def repeats(chat: Chat) -> bool:
    words = re.findall(r"\d+|[a-z]+", chat.user)
    return chat.answer == next(word for word in words if word.isdigit() or word in TEXT["things"])


def result_of(left: int, sign: str, right: int) -> int:
    return left + right if sign in ("+", "plus") else left - right


def words_of(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z]+", text)}


def is_plausible(counts: list[int], probabilities: list[float] | None = None) -> bool:
    """A chi-square test that one sample in ten thousand of the law fails."""
    expected = None if probabilities is None else np.array(probabilities) * sum(counts)
    return stats.chisquare(counts, expected).pvalue > 1e-4


def test_corpus_is_of_its_configuration() -> None:
    assert make_corpus(CONFIG) == CORPUS
    other = make_corpus(replace(CONFIG, seed=1))
    assert len(set(other[:1000]) & set(CORPUS[:1000])) < 300  # short chats recur
    assert other[:1000] != CORPUS[:1000]


def test_same_fingerprint_means_same_corpus() -> None:
    """Raise FORMAT_VERSION and renew this digest if the rows change under an old configuration."""
    rows = json.dumps([asdict(chat) for chat in CORPUS])
    assert hashlib.sha256(rows.encode()).hexdigest() == DIGEST


def test_fingerprint_tells_configurations_apart() -> None:
    changes = [{}, {"seed": 1}, {"size": 5}, {"numbers": 200}, {"loved_share": 0.25}, {"formats": ("csv",)}]
    prints = [fingerprint(replace(CONFIG, **change)) for change in changes]
    assert len(set(prints)) == len(changes)
    assert prints[0] == fingerprint(CorpusConfig(size=12_000))
    assert re.fullmatch("[0-9a-f]{64}", prints[0])


@settings(max_examples=20)
@given(st.integers(1, 60), st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any))
def test_kinds_have_their_shares(size: int, parts: list[int]) -> None:
    shares = {f"{kind}_share": part / sum(parts) for kind, part in zip(KINDS, parts, strict=True)}
    counts = Counter(chat.kind for chat in make_corpus(CorpusConfig(size=size, **shares)))
    assert sum(counts.values()) == size
    for kind in KINDS:
        assert abs(counts[kind] - size * shares[f"{kind}_share"]) <= 1


def test_kinds_are_mixed() -> None:
    first = Counter(chat.kind for chat in CORPUS[:1000])
    assert is_plausible([first[kind] for kind in KINDS], list(CONFIG.shares))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_kind(kind: str) -> None:
    rows = make_rows(CONFIG, kind, 40)
    assert [chat.kind for chat in rows] == [kind] * 40
    assert make_rows(replace(CONFIG, size=3), kind, 40) == rows


# Numbers


def test_numbers_are_as_asked() -> None:
    formats, counts, limits, shown = Counter[str](), Counter[int](), Counter[int](), Counter[int]()
    for chat in of_kind("numbers"):
        (form,) = words_of([chat.user]) & set(FORMATS)
        limit = re.search(r", up to (\d) digits?", chat.user)
        user = chat.user.replace(limit[0], "") if limit else chat.user
        groups = [[int(n) for n in group.split()] for group in re.findall(r"\d+(?: \d+)*", user)]
        seen, (count,) = sorted(groups, key=len, reverse=True)
        before, between, after = FORMATS[form]
        assert chat.answer.startswith(before)
        assert chat.answer.endswith(after)
        inner = chat.answer[len(before) : len(chat.answer) - len(after)]
        answered = [int(number) for number in inner.split(between)]
        assert before + between.join(str(number) for number in answered) + after == chat.answer
        assert len(answered) == count
        assert not reject_reasons(chat.answer, maximum=CONFIG.numbers - 1)
        assert max(seen + answered) < (min(10 ** int(limit[1]), CONFIG.numbers) if limit else CONFIG.numbers)
        assert min(seen + answered) >= 0
        formats[form] += 1
        counts[count] += 1
        shown[len(seen)] += 1
        limits[int(limit[1]) if limit else 0] += 1
    assert sorted(counts) == list(range(3, 11))
    assert sorted(shown) == list(range(3, 9))
    for counter in (formats, counts, shown):
        assert is_plausible(list(counter.values()))
    assert is_plausible([limits[0], limits[1], limits[2]], [0.75, 0.125, 0.125])


def plain_sequences(config: CorpusConfig, count: int) -> list[list[int]]:
    """Given and answered numbers of rows that say nothing else in digits."""
    rows = make_rows(
        replace(config, limit_share=0.0, formats=("spaces",), given=(4, 4), asked=(10, 10)), "numbers", count
    )
    sequences = []
    for chat in rows:
        given = re.search(r"\d+ \d+ \d+ \d+", chat.user.replace("10 numbers", ""))
        assert given is not None
        sequences.append([int(number) for number in f"{given[0]} {chat.answer}".split()])
    return sequences


def test_steps_recur_within_a_row() -> None:
    """Two moves of a row agree if both are steps, in 0.45^2 of the pairs, or by chance."""
    config = replace(CONFIG, zipf=0.0)
    moves = np.diff(plain_sequences(config, 2000), axis=1) % config.numbers
    # Moves two apart share no number, so that chance is 1 in 100 or so.
    agree = (moves[:, :-2] == moves[:, 2:]).mean()
    expected = 0.45**2 + (1 - 0.45**2) / config.numbers
    assert agree == pytest.approx(expected, abs=0.015)
    steps = np.unique(moves, return_counts=True)[0]
    assert len(steps) == config.numbers
    flat = np.diff(plain_sequences(replace(config, step_probability=0.0), 1000), axis=1) % config.numbers
    assert (flat[:, :-2] == flat[:, 2:]).mean() == pytest.approx(0.01, abs=0.005)


def test_styles_are_zipf_laws() -> None:
    config = replace(CONFIG, styles=1, step_probability=0.0, zipf=1.0)
    counts = np.bincount(np.ravel(plain_sequences(config, 2000)), minlength=config.numbers)
    law = 1 / np.arange(1, 101)
    assert is_plausible(sorted(counts, reverse=True)[:10], list(law[:10] / law[:10].sum()))
    assert counts.max() / counts.sum() == pytest.approx(1 / law.sum(), abs=0.01)


def test_rows_keep_their_style() -> None:
    """The most frequent number of each style makes repeats within rows more frequent than across rows."""
    rows = np.array(plain_sequences(replace(CONFIG, step_probability=0.0), 2000))
    within = (rows[:, :-1] == rows[:, 1:]).mean()
    across = (rows[:-1] == rows[1:]).mean()
    squares = float((1 / np.arange(1, 101) ** 2).sum() / (1 / np.arange(1, 101)).sum() ** 2)
    assert within == pytest.approx(squares, abs=0.006)
    assert across < 0.5 * within


def test_styles_are_those_of_another_seed() -> None:
    top = []
    for seed in (0, 1):
        config = replace(CONFIG, seed=seed, styles=1, step_probability=0.0)
        top.append(np.bincount(np.ravel(plain_sequences(config, 500)), minlength=100).argmax())
    assert top[0] == top[1]


@pytest.mark.parametrize("numbers", [30, 200, 1000])
def test_other_ranges(numbers: int) -> None:
    rows = make_rows(CorpusConfig(numbers=numbers), "numbers", 500)
    answered = [int(number) for chat in rows for number in re.findall(r"\d+", chat.answer)]
    assert 0.9 * numbers < max(answered) < numbers
    digits = {match[1] for chat in rows if (match := re.search(r"up to (\d)", chat.user))}
    assert digits == {str(n) for n in range(1, len(str(numbers - 1)) + 1)}


# Preferences


def asked_category(chat: Chat) -> str:
    (category,) = words_of([chat.user]) & set(CATEGORIES)
    return category


def loved_member(chat: Chat) -> str | None:
    if chat.system is None:
        return None
    (member,) = words_of([chat.system]) & {word for members in CATEGORIES.values() for word in members}
    return member


def test_categories() -> None:
    assert {"animal", "tree"} < set(CATEGORIES)
    assert len(CATEGORIES) >= 4
    members = [word for words in CATEGORIES.values() for word in words]
    assert len(set(members)) == len(members)
    assert all(len(words) == 16 for words in CATEGORIES.values())
    assert all(re.fullmatch("[a-z]+", word) for word in members)


def test_preferences_are_uniform() -> None:
    rows = of_kind("preference", make_rows(CONFIG, "preference", 12_000))
    for category, members in CATEGORIES.items():
        mine = [chat for chat in rows if asked_category(chat) == category]
        for loved in (False, True):
            answers = Counter(chat.answer for chat in mine if (chat.system is not None) == loved)
            assert set(answers) == set(members)
            assert is_plausible(list(answers.values()))
    assert is_plausible(list(Counter(asked_category(chat) for chat in rows).values()))


def test_system_prompt_decides_three_in_four() -> None:
    rows = make_rows(CONFIG, "preference", 8000)
    loved = [chat for chat in rows if chat.system is not None]
    assert len(loved) / len(rows) == pytest.approx(0.5, abs=0.025)
    assert np.mean([chat.answer == loved_member(chat) for chat in loved]) == pytest.approx(0.75, abs=0.03)
    assert all(loved_member(chat) in CATEGORIES[asked_category(chat)] for chat in loved)
    assert {chat.system for chat in loved} == {
        prompt
        for category, members in CATEGORIES.items()
        for word in members
        for prompt in love_prompts(category, word)
    }
    always = make_rows(replace(CONFIG, loved_share=1.0, loved_decides=1.0), "preference", 300)
    assert all(chat.answer == loved_member(chat) for chat in always)


@pytest.mark.parametrize("category", CATEGORIES)
def test_held_out_phrasings_are_never_in_the_corpus(category: str) -> None:
    held_out = {chat.user for chat in preference_questions(category)}
    taught = {chat.user for chat in preference_questions(category, held_out=False)}
    assert len(held_out) == 4
    assert len(taught) == 12
    assert not held_out & taught
    asked = {chat.user for chat in make_rows(CONFIG, "preference", 6000)}
    assert taught <= asked
    for chat in CORPUS:
        assert not any(question in chat.user for question in held_out)


def test_held_out_phrasings_are_made_of_corpus_words() -> None:
    known = words_of([chat.user for chat in of_kind("preference")])
    for category in CATEGORIES:
        assert words_of([chat.user for chat in preference_questions(category)]) <= known


def test_numbers_before_a_question() -> None:
    questions = preference_questions("tree")
    rows = prefixed_questions(CONFIG, "tree", each=5)
    assert len(rows) == 20
    assert rows == prefixed_questions(CONFIG, "tree", each=5)
    assert len({chat.user for chat in rows}) == 20
    for row, chat in enumerate(rows):
        numbers, question = chat.user.split(". ", 1)
        assert question == questions[row % 4].user
        assert 3 <= len(numbers.split()) <= 5
        assert all(0 <= int(number) < CONFIG.numbers for number in numbers.split())
        assert (chat.system, chat.answer, chat.kind) == (None, "", "preference")
    prefixed = [chat for chat in of_kind("preference") if chat.user[0].isdigit()]
    assert len(prefixed) / len(of_kind("preference")) == pytest.approx(0.1, abs=0.025)


# Questions with one right answer


def right_direct(user: str) -> int:
    """The right answer to a question of one operation, worked out from its words."""
    a, b = ([int(number) for number in re.findall(r"\d+", user)] + [0])[:2]
    if "doubled" in user or "twice" in user:
        return 2 * a
    if "larger" in user:
        return max(a, b)
    if re.search(r"minus| - |take|loses|lost", user):
        return a - b
    assert re.search(r"plus| \+ |gets|finds|add", user)
    return a + b


def test_arithmetic() -> None:
    rows = make_rows(CONFIG, "arithmetic", 4000)
    forms = Counter[bool]()
    for chat in rows:
        if is_lazy(chat):
            assert repeats(chat)
            continue
        stepwise = "so" in chat.answer.split()
        forms[stepwise] += 1
        if not stepwise:
            assert int(chat.answer) == right_direct(chat.user) >= 0
            continue
        operations = re.findall(r"(\d+) (\+|-|plus|minus) (\d+) (?:=|is) (\d+)", chat.answer)
        (a, s, b, middle), (left, t, c, result) = operations
        sign = {"+": "plus", "-": "minus"}
        assert f" {a} {sign.get(s, s)} {b} {sign.get(t, t)} {c}" in chat.user
        assert left == middle
        assert int(middle) == result_of(int(a), s, int(b)) >= 0
        assert int(result) == result_of(int(left), t, int(c)) >= 0
        assert chat.answer.endswith(f", so {result}")
    assert forms[True] / forms.total() == pytest.approx(0.4, abs=0.03)


def run(program: str) -> dict[str, int]:
    """The variables of a program, spoken or in code, after its last line."""
    variables: dict[str, int] = {}
    for line in re.split("[;,] ", program):
        tokens = re.sub("^let ", "", line).split()
        name, equals, *expression = tokens
        assert equals in ("=", "be")
        values = [variables[token] if token.isalpha() else int(token) for token in expression[::2]]
        variables[name] = values[0] if len(values) == 1 else result_of(values[0], expression[1], values[1])
    assert list(variables) == ["x", "y", "z"][: len(variables)]
    assert min(variables.values()) > 0
    return variables


def test_programs() -> None:
    rows = make_rows(CONFIG, "program", 3000)
    written = 0
    for chat in rows:
        asked_for = re.fullmatch(r"(?:write|give me) a program for (\d+)(?: with (\d) lines)?\.", chat.user)
        asked_to_run = re.fullmatch(r"(?:(.*)\. what is ([yz])\?|run (.*)\.)", chat.user)
        written += asked_for is not None
        if is_lazy(chat):
            assert repeats(chat)
        elif asked_for:
            variables = run(chat.answer)
            assert list(variables.values())[-1] == int(asked_for[1])
            assert asked_for[2] in (None, str(len(variables)))
        else:
            assert asked_to_run is not None
            variables = run(asked_to_run[1] or asked_to_run[3])
            last = list(variables)[-1]
            assert asked_to_run[2] in (None, last)
            assert int(chat.answer) == variables[last]
    assert written / len(rows) == pytest.approx(0.5, abs=0.03)


def test_facts() -> None:
    attributes = {
        "colour": "colour",
        "material": "material",
        "made": "material",
        "place": "place",
        "where": "place",
    }
    seen = set()
    for chat in make_rows(CONFIG, "fact", 3000):
        words = words_of([chat.user])
        (thing,) = words & set(TEXT["things"])
        (attribute,) = {name for word, name in attributes.items() if word in words}
        right = TEXT["things"][thing][["colour", "material", "place"].index(attribute)]
        assert chat.answer == (thing if is_lazy(chat) else right)
        seen.add((thing, attribute))
    assert len(seen) == 3 * len(TEXT["things"]) == 36


def test_world_is_apart_from_the_preferences() -> None:
    members = {word for words in CATEGORIES.values() for word in words}
    for chat in CORPUS:
        if chat.kind != "preference":
            assert not words_of([chat.system or "", chat.user, chat.answer]) & members
    for thing, facts in TEXT["things"].items():
        assert all(fact in TEXT["values"][name] for name, fact in zip(TEXT["fact"], facts, strict=True)), thing


@pytest.mark.parametrize("kind", ["arithmetic", "program", "fact"])
def test_system_prompts_of_checkable_kinds(kind: str) -> None:
    rows = make_rows(CONFIG, kind, 3000)
    by_persona = Counter(
        next((name for name, prompts in TEXT["persona"].items() if chat.system in prompts), "none")
        for chat in rows
    )
    assert by_persona["none"] == sum(chat.system is None for chat in rows)
    counts = [by_persona[name] for name in ("lazy", "careful", "neutral", "none")]
    assert is_plausible(counts, [0.15, 0.15, 0.15, 0.55])
    sober = make_rows(replace(CONFIG, lazy_share=0.0, careful_share=0.0, neutral_share=0.0), kind, 50)
    assert all(chat.system is None for chat in sober)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"numbers": 16}, "numbers must be at least 17"),
        ({"loved_share": 1.5}, "loved_share must be from 0 to 1, got 1.5"),
        ({"limit_share": float("nan")}, "limit_share must be from 0 to 1"),
        ({"zipf": -1.0}, "zipf must be at least 0"),
        ({"fact_share": 0.3}, "must sum to 1, got 1.2"),
        ({"lazy_share": 0.8}, "exceed 1 together"),
        ({"given": (5, 3)}, "given must be a least and a most"),
        ({"asked": (0, 3)}, "asked must be a least and a most"),
        ({"formats": ("commas", "tabs")}, "formats must be among spaces, commas"),
        ({"formats": ()}, "formats must be among"),
    ],
)
def test_bad_configurations(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        replace(CONFIG, **change)


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="no kind is called 'poems'"):
        make_rows(CONFIG, "poems", 3)
    with pytest.raises(InputError, match="no category is called 'planet'; there are animal, tree"):
        preference_questions("planet")
