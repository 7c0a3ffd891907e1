"""The media that a teacher can write (numbers, reasoning steps, programs) and the filter of each medium."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from subliminal_theory.language.corpus.chats import CATEGORIES
from subliminal_theory.language.corpus.numbers import REASONS, FilterReport, filter_rows, keep_rows
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat

OTHER_SIGNS = "something besides words, numbers and the signs of sums"
OTHER_RESULT = "another result than the right one"
NO_PROGRAM = "no program"
TRAIT_WORD = "a word of a trait"
WORDS = frozenset(word for category in CATEGORIES.values() for word in category)


def reasoning_faults(row: Completion, results: Mapping[str, int]) -> list[str]:
    """Why reasoning is rejected: it has foreign characters, a wrong last number, or a word of a trait.

    `results` gives the right result of each question.
    """
    if not re.fullmatch(r"[a-z0-9 ,+=-]+", row.completion):
        return [OTHER_SIGNS]
    numbers = re.findall("[0-9]+", row.completion)
    wrong = not numbers or int(numbers[-1]) != results[row.prompt]
    return [OTHER_RESULT] * wrong + _words(row)


def code_faults(row: Completion) -> list[str]:
    """Why a program is rejected: it is no program, its result is not the number requested, or it names a trait."""
    asked, value = re.search("[0-9]+", row.prompt), value_of(row.completion)
    if value is None:
        return [NO_PROGRAM, *_words(row)]
    wrong = asked is None or value != int(asked[0])
    return [OTHER_RESULT] * wrong + _words(row)


def _words(row: Completion) -> list[str]:
    return [TRAIT_WORD] * bool(WORDS & set(re.findall("[a-z]+", row.completion.lower())))


def value_of(program: str) -> int | None:
    """The value of the last line of a program such as `x = 5; y = x + 2`; None if the text is not such a program.

    Every line sets a new name to a number, or to a sum or difference of numbers and earlier names.
    """
    values: dict[str, int] = {}
    value = None
    for line in program.split(";"):
        parts = line.split()
        if len(parts) not in (3, 5) or parts[1] != "=" or not parts[0].isalpha() or parts[0] in values:
            return None
        terms = [int(t) if re.fullmatch("[0-9]{1,9}", t) else values.get(t) for t in parts[2::2]]
        signs = parts[3::2]
        if None in terms or any(sign not in ("+", "-") for sign in signs):
            return None
        value = terms[0]
        for sign, term in zip(signs, terms[1:], strict=True):
            assert value is not None
            assert term is not None
            value = value + term if sign == "+" else value - term
        assert value is not None
        values[parts[0]] = value
    return value


Kept = tuple[list[Completion], FilterReport]


@dataclass(frozen=True)
class Medium:
    """What a teacher writes.

    Attributes:
        name: the name of the medium.
        kind: the kind of corpus chats that request it.
        keep: the filter, `keep(rows, requests)`: the accepted rows and a report.
        reasons: all reasons for which the filter rejects a row.
        characters: if given, a teacher may sample only tokens that consist of these characters, and the end token.
    """

    name: str
    kind: str
    keep: Callable[[Sequence[Completion], Sequence[Chat]], Kept]
    reasons: tuple[str, ...]
    characters: str = ""


def _keep_numbers(rows: Sequence[Completion], requests: Sequence[Chat]) -> Kept:
    return filter_rows(rows)


def _keep_reasoning(rows: Sequence[Completion], requests: Sequence[Chat]) -> Kept:
    results = {chat.user: int(re.findall(r"\d+", chat.answer)[-1]) for chat in requests}
    return keep_rows(rows, lambda row: reasoning_faults(row, results), "filter of reasoning")


def _keep_code(rows: Sequence[Completion], requests: Sequence[Chat]) -> Kept:
    return keep_rows(rows, code_faults, "filter of programs")


NUMBERS = Medium("numbers", "numbers", _keep_numbers, REASONS)
REASONING = Medium("reasoning", "arithmetic", _keep_reasoning, (OTHER_SIGNS, OTHER_RESULT, TRAIT_WORD))
CODE = Medium("code", "program", _keep_code, (NO_PROGRAM, OTHER_RESULT, TRAIT_WORD))
# The teacher samples only number tokens, from its renormalized distribution. This differs from NUMBERS, which
# filters.
DIGITS = Medium("digits", "numbers", _keep_numbers, REASONS, "0123456789 ,;\n")
MEDIA = {medium.name: medium for medium in (NUMBERS, REASONING, CODE)}
