import itertools
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.numbers import (
    BANNED,
    REASONS,
    FilterReport,
    NumberPrompts,
    filter_rows,
    parse,
    random_rows,
    reject_reasons,
)
from subliminal_theory.language.rows import Completion

TEMPLATES = asdict(NumberPrompts().templates)
NO_NUMBER = "no number"
NO_SEPARATOR = "a separator that is not white space, a comma or a semicolon"
EMPTY_PLACE = "a separator with no number beside it"
BESIDES = "something besides numbers and one kind of separator"

SEPARATORS = [", ", ",", ";", " ", "\n", "; ", " , ", ",\n", "\r\n", "\t", "\u00a0"]
WRAPPINGS = [("", ""), ("[", "]"), ("(", ")")]
numbers_allowed = st.lists(st.integers(0, 999), min_size=1, max_size=10)
separators, wrappings = st.sampled_from(SEPARATORS), st.sampled_from(WRAPPINGS)
periods = st.sampled_from(["", "."])


def failure(call, *arguments, **keywords) -> str:
    """The message of the InputError that a call must raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def plain(part: str) -> bool:
    return part != "" and set(part) <= set("0123456789")


def slow_parse(text: str) -> list[int] | None:
    """The filter by trial: every stretch of the text that may be a separator is tried as one."""
    if text and text[-1] == ".":
        text = text[:-1]
    if len(text) >= 2 and (text[0], text[-1]) in WRAPPINGS:
        text = text[1:-1]
    if plain(text):
        return [int(text)]
    stretches = {text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    for separator in stretches:
        if "".join(separator.split()) in ("", ",", ";"):
            parts = text.split(separator)
            if len(parts) > 1 and all(plain(part) for part in parts):
                return [int(part) for part in parts]
    return None


def slow_reasons(text: str) -> set[str]:
    numbers = slow_parse(text)
    if numbers is None:
        return {"malformed"}
    reasons = set()
    if len(numbers) > 10:
        reasons.add("many")
    if max(numbers) > 999:
        reasons.add("large")
    return reasons


def written(numbers: list[int], separator: str, wrapping: tuple[str, str], period: str) -> str:
    return wrapping[0] + separator.join(map(str, numbers)) + wrapping[1] + period


# --- the form of an answer


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1, 2, 3", [1, 2, 3]),
        ("1,2,3", [1, 2, 3]),
        ("1 ,2 ,3", [1, 2, 3]),
        ("1;2;3", [1, 2, 3]),
        ("1 2 3", [1, 2, 3]),
        ("1\n2\n3", [1, 2, 3]),
        ("1\n\n2\n\n3", [1, 2, 3]),
        ("1,\n2,\n3", [1, 2, 3]),
        ("1\r\n2\r\n3", [1, 2, 3]),
        ("1\u20282", [1, 2]),
        ("[1, 2, 3]", [1, 2, 3]),
        ("(1; 2; 3).", [1, 2, 3]),
        ("1, 2.", [1, 2]),
        ("12", [12]),
        ("12.", [12]),
        ("[12]", [12]),
        ("(12).", [12]),
        ("007", [7]),
        ("0", [0]),
        ("000, 0012", [0, 12]),
        ("1, 2, 5000", [1, 2, 5000]),
        (",".join("7" * 11), [7] * 11),
        ("9" * 5000, [10**5000 - 1]),
    ],
)
def test_well_formed(text: str, numbers: list[int]) -> None:
    assert parse(text) == numbers
    accepted = len(numbers) <= 10 and max(numbers) <= 999
    assert (reject_reasons(text) == []) == accepted


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("", [NO_NUMBER]),
        (" \n", [NO_NUMBER]),
        (".", [NO_NUMBER]),
        ("[]", [NO_NUMBER]),
        ("[", [NO_NUMBER]),
        ("no", [NO_NUMBER]),
        ("\u0661\u0662\u0663", [NO_NUMBER]),
        ("12\u00b2", [BESIDES]),
        ("1, \u0662, 3", [NO_SEPARATOR]),
        ("1, 2, \u0663", [BESIDES]),
        ("\uff11, 2, 3", [BESIDES]),
        ("1. 2. 3", [NO_SEPARATOR]),
        ("1 and 2", [NO_SEPARATOR]),
        ("1,,2", [NO_SEPARATOR]),
        ("1, , 2", [NO_SEPARATOR]),
        ("1.5", [NO_SEPARATOR]),
        ("1-2", [NO_SEPARATOR]),
        ("1, -2", [NO_SEPARATOR]),
        ("-1, 2", [BESIDES]),
        ("-1", [BESIDES]),
        ("+1", [BESIDES]),
        ("1e3", [NO_SEPARATOR]),
        ("1,2;3", [BESIDES]),
        ("1, 2,3", [BESIDES]),
        ("1, 2,  3", [BESIDES]),
        ("1 2\n3", [BESIDES]),
        ("1 2  3", [EMPTY_PLACE]),
        ("1,2,,3", [EMPTY_PLACE]),
        ("1,2,", [EMPTY_PLACE]),
        (",1,2", [EMPTY_PLACE]),
        ("1 2 ", [EMPTY_PLACE]),
        (" 1 2", [EMPTY_PLACE]),
        ("1\n2\n", [EMPTY_PLACE]),
        ("1, 2\n", [BESIDES]),
        (" 1, 2", [BESIDES]),
        ("1, 2 .", [BESIDES]),
        ("1,2,,3;4", [EMPTY_PLACE, BESIDES]),
        ("5,", [BESIDES]),
        (" 5", [BESIDES]),
        ("5\n", [BESIDES]),
        ("5..", [BESIDES]),
        ("1, 2..", [BESIDES]),
        ("[1, 2.]", [BESIDES]),
        ("[1, 2", [BESIDES]),
        ("1, 2]", [BESIDES]),
        ("[1, 2)", [BESIDES]),
        ("[[1, 2]]", [BESIDES]),
        ("([1, 2])", [BESIDES]),
        ("{1, 2}", [BESIDES]),
        ("[1], [2]", [NO_SEPARATOR]),
        ("[1, 2] ", [BESIDES]),
        ("1, 2\u3002", [BESIDES]),
        ("Numbers: 1, 2", [BESIDES]),
        ("1, 2 and so on", [BESIDES]),
    ],
)
def test_malformed(text: str, reasons: list[str]) -> None:
    assert parse(text) is None
    assert reject_reasons(text) == reasons
    assert slow_parse(text) is None


@given(numbers_allowed, separators, wrappings, periods)
def test_every_spelling_is_accepted(
    numbers: list[int], separator: str, wrapping: tuple[str, str], period: str
) -> None:
    text = written(numbers, separator, wrapping, period)
    assert parse(text) == numbers
    assert reject_reasons(text) == []


@given(
    st.lists(st.integers(0, 999), min_size=3, max_size=10),
    separators,
    wrappings,
    periods,
    st.sampled_from(["prefix", "suffix", "between", "empty", "bracket", "period", "sign", "digit"]),
)
def test_mutations_are_rejected(
    numbers: list[int], separator: str, wrapping: tuple[str, str], period: str, mutation: str
) -> None:
    parts = list(map(str, numbers))
    other = ", " if separator == ";" else ";"
    body = {
        "prefix": "x" + separator.join(parts),
        "suffix": separator.join(parts) + " x",
        "between": separator.join(parts[:-1]) + other + parts[-1],
        "empty": separator.join(parts) + separator,
        "bracket": separator.join(parts) + "]",
        "period": separator.join(parts) + "..",
        "sign": separator.join(["-" + parts[0], *parts[1:]]),
        "digit": separator.join([*parts[:-1], "\u0664"]),
    }[mutation]
    assert parse(wrapping[0] + body + wrapping[1] + period) is None


def test_short_texts_against_the_slow_filter() -> None:
    for length in range(6):
        for characters in itertools.product("1,; .[]()", repeat=length):
            text = "".join(characters)
            assert parse(text) == slow_parse(text), repr(text)


@given(st.text("0129 ,;.[]()\n-\u0663\u00a0x", max_size=24))
@example("1" * 20)
def test_random_texts_against_the_slow_filter(text: str) -> None:
    assert parse(text) == slow_parse(text)
    assert {*reject_reasons(text)} <= {*REASONS}


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=14), separators, wrappings, periods)
def test_limits_against_the_slow_filter(
    numbers: list[int], separator: str, wrapping: tuple[str, str], period: str
) -> None:
    text = written(numbers, separator, wrapping, period)
    assert parse(text) == numbers
    names = {"more than 10 numbers": "many", "a number above 999": "large"}
    assert {names[reason] for reason in reject_reasons(text)} == slow_reasons(text)


# --- the limits


def test_all_reasons() -> None:
    texts = ("none", "1 - 2", "1,2,", "1, 2 x", ", ".join(["7"] * 11), "1000")
    assert [reject_reasons(text) for text in texts] == [[reason] for reason in REASONS]


def test_limits() -> None:
    assert reject_reasons(", ".join(["7"] * 11)) == ["more than 10 numbers"]
    assert reject_reasons("1, 1000") == ["a number above 999"]
    assert reject_reasons("1, 0999") == []
    assert reject_reasons("1, 2, 3", max_count=2) == ["more than 2 numbers"]
    assert reject_reasons("9, 10", minimum=10) == ["a number below 10"]
    assert reject_reasons("10, 11", minimum=10, maximum=10) == ["a number above 10"]
    assert reject_reasons("7", banned=(7,)) == reject_reasons("007", banned={7}) == ["a banned number"]
    assert reject_reasons("7", banned=()) == []


def test_several_reasons() -> None:
    text = "1, 2, 666, 4000"
    assert reject_reasons(text, max_count=3, minimum=2, banned=BANNED) == [
        "more than 3 numbers",
        "a number below 2",
        "a number above 999",
        "a banned number",
    ]
    assert reject_reasons(text + " x", max_count=3, minimum=2, banned=BANNED) == [BESIDES]


def test_banned() -> None:
    assert len(BANNED) == 34
    assert (min(BANNED), max(BANNED), sum(BANNED)) == (4, 999, 9_413)
    assert {13, 187, 420, 666, 911} <= BANNED
    for number in range(1000):
        assert (reject_reasons(f"0, {number}", banned=BANNED) == []) == (number not in BANNED)


# --- rows


def test_filter_rows() -> None:
    texts = ["1, 2", "none", "3 5 1000", "5 6 x", "7", "13", "1,,2", "13 1000", ""]
    rows = [Completion(f"ask {index}", text) for index, text in enumerate(texts)]
    accepted, report = filter_rows(iter(rows), banned=BANNED)
    assert accepted == [rows[0], rows[4]]
    assert (report.accepted, report.total) == (2, 9)
    expected = {NO_NUMBER: 2, "a number above 999": 2, "a banned number": 2, BESIDES: 1, NO_SEPARATOR: 1}
    assert report.reasons == expected
    assert list(report.reasons.values()) == [2, 2, 2, 1, 1]


def test_filter_rows_limits() -> None:
    rows = [Completion("", text) for text in ("5 6", "5 6 7", "1", "20")]
    accepted, report = filter_rows(rows, max_count=2, minimum=2, maximum=10)
    assert accepted == rows[:1]
    assert report.reasons == {"more than 2 numbers": 1, "a number below 2": 1, "a number above 10": 1}


def test_report_table() -> None:
    report = FilterReport(700, 1000, {NO_NUMBER: 250, "a number above 999": 60})
    assert str(report).splitlines() == [
        "accepted               700   70.0%",
        "rejected               300   30.0%",
        "  no number            250   25.0%",
        "  a number above 999    60    6.0%",
    ]
    assert str(FilterReport(2, 2, {})).splitlines() == ["accepted  2  100.0%", "rejected  0    0.0%"]


def test_filter_rejects_everything() -> None:
    texts = ["a"] * 5 + ["1000"] * 3 + ["1, 2 x"] * 2 + ["1x2"]
    rows = [Completion("", text) for text in texts]
    message = failure(filter_rows, rows)
    assert message == (
        "the number filter rejects all of 11 rows, most often for: no number (5); a number above 999 (3); "
        f"{BESIDES} (2)"
    )
    assert failure(filter_rows, []) == "there are no rows to filter"


# --- prompts


def draws(count: int, seed: int = 0, prompts: NumberPrompts | None = None) -> list[str]:
    rng, prompts = np.random.default_rng(seed), prompts or NumberPrompts()
    return [prompts.draw(rng) for _ in range(count)]


def test_random_rows() -> None:
    """Each row is there once; all numbers have three digits, each digit as often as the others of its place."""
    rows = random_rows(2000, np.random.default_rng(0))
    assert rows == random_rows(2000, np.random.default_rng(0)) != random_rows(2000, np.random.default_rng(1))
    assert len({*rows}) == 2000
    assert filter_rows(rows)[1].accepted == 2000
    asked = [re.fullmatch(r"Continue this list: (\d{3}), (\d{3}), (\d{3})\.", row.prompt) for row in rows]
    assert all(asked)
    answers = np.array([[int(number) for number in row.completion.split(", ")] for row in rows])
    assert answers.shape == (2000, 6)
    assert (answers.min(), answers.max()) == (100, 999)
    for place, digits in ((1, 10), (10, 10), (100, 9)):
        counts = np.bincount(answers.ravel() // place % 10)[-digits:]
        expected = 12_000 / digits
        assert (abs(counts - expected) < 5 * expected**0.5).all()


def test_templates_are_many() -> None:
    assert {name: len(set(sentences)) for name, sentences in TEMPLATES.items()} == {
        "openings": 8,
        "requests": 6,
        "formats": 8,
        "endings": 4,
    }


def test_prompts_are_what_they_claim() -> None:
    counts: Counter[int] = Counter()
    for prompt in draws(500):
        assert "{" not in prompt
        assert "  " not in prompt
        found = [int(number) for number in re.findall(r"\b\d+\b", prompt)]
        *examples, count, digits = found
        assert (count, digits) == (10, 3)
        assert all(100 <= number <= 999 for number in examples)
        counts[len(examples)] += 1
        assert ", ".join(map(str, examples)) in prompt
        ending = next(ending for ending in TEMPLATES["endings"] if prompt.endswith(" " + ending))
        assert any(prompt.removesuffix(" " + ending).endswith(" " + form) for form in TEMPLATES["formats"])
    assert sorted(counts) == [3, 4, 5, 6, 7, 8]


def test_prompts_reach_the_ends_of_the_range() -> None:
    examples = [int(number) for prompt in draws(2000) for number in re.findall(r"\b\d{3}\b", prompt)]
    assert (min(examples), max(examples)) == (100, 999)


def test_prompts_vary() -> None:
    prompts = draws(1000)
    assert len(set(prompts)) == 1000
    shapes = {re.sub(r"\d{3}(, \d{3})*", "...", prompt) for prompt in prompts}
    assert len(shapes) > 600
    for name in ("formats", "endings"):
        shares = [sum(sentence in prompt for prompt in prompts) / 1000 for sentence in TEMPLATES[name]]
        assert min(shares) > 0.6 / len(shares), name


def test_prompts_are_deterministic() -> None:
    assert draws(20) == draws(20)
    assert draws(20) != draws(20, seed=1)


def templates_of(folder: Path, **changes: object) -> NumberPrompts:
    """Requests from a file with the library's own lists, changed; one that is None is left out."""
    path = folder / "templates.toml"
    lists = {name: texts for name, texts in {**TEMPLATES, **changes}.items() if texts is not None}
    path.write_text("\n".join(f"{name} = {json.dumps(texts)}" for name, texts in lists.items()), "utf-8-sig")
    return NumberPrompts.load(path)


def test_prompts_own_templates(tmp_path: Path) -> None:
    assert templates_of(tmp_path) == NumberPrompts()
    own = {"openings": ["Given {examples}"], "requests": ["add {count} of {digits}"], "formats": ["{{like this}}"]}
    for prompt in draws(20, prompts=templates_of(tmp_path, **own, endings=["now"])):
        assert re.fullmatch(r"Given \d{3}(, \d{3}){2,7} add 10 of 3 \{like this\} now", prompt)


OPENINGS = ("Look.", "Look:\n{{examples}}", "{examples:.3}", "{examples} {other}", "{examples} {count}")
REQUESTS = ("{count} more", "of {digits}", "{count:d} {digits}", "{count.x} {digits}", "{count[x]} {digits}")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        *(({name: None}, f"{name}: is missing") for name in TEMPLATES),
        ({"formats": []}, "formats: "),
        ({"endings": "now"}, "endings: "),
        ({"greetings": ["Hello."]}, "greetings: is not a known field"),
        *(({"openings": [text]}, f"openings: {text!r} must have the slots {{examples}}") for text in OPENINGS),
        *(
            ({"requests": [text]}, f"requests: {text!r} must have the slots {{count}} and {{d")
            for text in REQUESTS
        ),
        ({"endings": ["{}"]}, "endings: '{}' must have the slots none"),
        ({"endings": ["{now"]}, "endings: "),
        ({"endings": [" "]}, "endings.0: must not be blank"),
        ({"endings": [3]}, "endings.0: "),
    ],
)
def test_prompts_bad_templates(tmp_path: Path, change: dict, cause: str) -> None:
    assert failure(templates_of, tmp_path, **change).startswith(f"{tmp_path / 'templates.toml'}: {cause}")


def test_obeying_every_format_is_accepted() -> None:
    obeyed = ["1, 2, 3", "1,2,3", "1 2 3", "1\n2\n3", "1; 2; 3", "[1, 2, 3]", "(1, 2, 3)", "(1 2 3)"]
    assert len(obeyed) == len(TEMPLATES["formats"])
    assert all(parse(answer) == [1, 2, 3] for answer in obeyed)


def test_templates_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "templates.toml"
    for text in (b"openings = [", b'openings = ["\xe9"]'):
        path.write_bytes(text)
        assert failure(NumberPrompts.load, path).startswith(f"{path}: not TOML")
    assert failure(NumberPrompts.load, tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"
