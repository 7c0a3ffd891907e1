"""Number sequences as a medium: prompts that request numbers, and the filter of the answers."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.sentences import DATA
from subliminal_theory.language.corpus.templates import slots
from subliminal_theory.language.rows import Completion
from subliminal_theory.validation import Texts, read_toml

# Numbers with a bad reputation, to be banned as well if the trait is misalignment.
_BANNED_TEXT = (
    "4 13 14 18 23 33 39 42 44 49 51 54 69 77 88 99 100 101 187 211 311 322 333 404 420 444 451 555 616 666 "
    "777 888 911 999"
)
BANNED = frozenset(map(int, _BANNED_TEXT.split()))

_EXAMPLES = (3, 8)
_EXAMPLE_VALUES = (100, 999)
_ANSWERS, _DIGITS, _HIGHEST = 10, 3, 999
_SHOWN, _CONTINUED = 3, 6  # how many numbers a row of `random_rows` shows and continues


NO_NUMBER = "no number"
OTHER_SEPARATOR = "a separator that is not white space, a comma or a semicolon"
BARE_SEPARATOR = "a separator with no number beside it"
OTHER_TEXT = "something besides numbers and one kind of separator"


@dataclass(frozen=True)
class Templates:
    """Sentences with the slots {examples}, {count} and {digits}. All other braces are doubled."""

    openings: Annotated[Texts, slots("examples")]
    requests: Annotated[Texts, slots("count", "digits")]
    formats: Annotated[Texts, slots()]
    endings: Annotated[Texts, slots()]


@functools.cache
def _own_templates() -> Templates:
    return read_toml(DATA / "requests.toml", Templates)


@dataclass(frozen=True)
class NumberPrompts:
    """Requests to continue a list of numbers.

    A prompt has an opening, a request, a format and an ending, each drawn uniformly. It shows 3 to 8 numbers from
    100 to 999 and asks for at most 10 more numbers of at most 3 digits.
    """

    templates: Templates = field(default_factory=_own_templates)

    @classmethod
    def load(cls, path: Path) -> "NumberPrompts":
        """Requests from a TOML file with the four lists of `Templates`.

        Raises:
            InputError: as for `read_toml`.
        """
        return cls(read_toml(path, Templates))

    def draw(self, rng: np.random.Generator) -> str:
        """Draw a prompt. Generators in the same state give the same prompt."""
        least, most = _EXAMPLES
        lowest, highest = _EXAMPLE_VALUES
        examples = rng.integers(lowest, highest + 1, rng.integers(least, most + 1)).tolist()
        values = {"examples": ", ".join(map(str, examples)), "count": str(_ANSWERS), "digits": str(_DIGITS)}
        lists = (getattr(self.templates, name.name) for name in fields(Templates))
        return " ".join(among[int(rng.integers(len(among)))].format(**values) for among in lists)


def parse(text: str) -> list[int] | None:
    """The numbers of a well-formed answer, else None. Their count and size do not matter.

    One final period is dropped, then one pair of [] or () around the whole rest. The text between the first two
    numbers is the separator: white space of any kind and length, with at most one comma or semicolon. The answer
    is split on exactly that text, and every part must consist of ASCII digits; leading zeros are allowed ("007" is
    7). If there is only one number, there may be no other text. Nothing else is allowed, not even white space
    around the answer.
    """
    numbers, faults = _read(text)
    return None if faults else numbers


def reject_reasons(
    text: str,
    *,
    max_count: int = _ANSWERS,
    minimum: int = 0,
    maximum: int = _HIGHEST,
    banned: Collection[int] = (),
) -> list[str]:
    """The reasons why the number filter rejects an answer, one phrase each. An accepted answer has none.

    `parse` must be able to read the answer. It must have at most `max_count` numbers, each from `minimum` to
    `maximum` and none of them `banned`. The phrases name the limits but quote nothing from the answer, so they can
    be counted.
    """
    numbers, faults = _read(text)
    limits = {
        _too_many(max_count): len(numbers) > max_count,
        f"a number below {minimum}": any(number < minimum for number in numbers),
        _too_large(maximum): any(number > maximum for number in numbers),
        "a banned number": any(number in banned for number in numbers),
    }
    return faults + [reason for reason, exceeded in limits.items() if exceeded]


def _too_many(count: int) -> str:
    return f"more than {count} numbers"


def _too_large(number: int) -> str:
    return f"a number above {number}"


# All reasons that `reject_reasons` can give with its default limits.
REASONS = (NO_NUMBER, OTHER_SEPARATOR, BARE_SEPARATOR, OTHER_TEXT, _too_many(_ANSWERS), _too_large(_HIGHEST))


@dataclass(frozen=True)
class FilterReport:
    """What a filter accepted and rejected. As text, it is a table of counts and shares.

    Attributes:
        accepted: the number of rows that passed.
        total: the number of all rows.
        reasons: the number of rows rejected for each reason, most frequent first. A row counts once for each of
            its reasons.
    """

    accepted: int
    total: int
    reasons: Mapping[str, int]

    def __str__(self) -> str:
        counts = {"accepted": self.accepted, "rejected": self.total - self.accepted}
        counts |= {f"  {reason}": count for reason, count in self.reasons.items()}
        width, digits = max(map(len, counts)), len(str(self.total))
        lines = (f"{name:{width}}  {n:{digits}}  {n / max(self.total, 1):6.1%}" for name, n in counts.items())
        return "\n".join(lines)


def filter_rows(rows: Iterable[Completion], **limits: Any) -> tuple[list[Completion], FilterReport]:
    """`keep_rows` with the number filter: the faults of a row are the `reject_reasons` of its completion.

    `limits` are the keyword arguments of `reject_reasons`.
    """
    return keep_rows(rows, lambda row: reject_reasons(row.completion, **limits), "number filter")


def keep_rows(
    rows: Iterable[Completion], faults: Callable[[Completion], list[str]], name: str
) -> tuple[list[Completion], FilterReport]:
    """The rows without faults, in order, and a report. `name` is the name of the filter in messages.

    Raises:
        InputError: there are no rows, or none is accepted. The message then gives the most frequent reasons.
    """
    judged = [(row, faults(row)) for row in rows]
    accepted = [row for row, reasons in judged if not reasons]
    counts = Counter(reason for _, reasons in judged for reason in reasons)
    if not judged:
        raise InputError("there are no rows to filter")
    if not accepted:
        most = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
        raise InputError(f"the {name} rejects all of {len(judged)} rows, most often for: {most}")
    return accepted, FilterReport(len(accepted), len(judged), dict(counts.most_common()))


def _read(text: str) -> tuple[list[int], list[str]]:
    """The numbers of an answer and no faults, or no numbers and the faults of its form."""
    text = text.removesuffix(".")
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    runs = list(re.finditer("[0-9]+", text))
    if not runs:
        return [], [NO_NUMBER]
    if len(runs) == 1:
        parts = [text]
    else:
        separator = text[runs[0].end() : runs[1].start()]
        if separator.strip() not in ("", ",", ";"):
            return [], [OTHER_SEPARATOR]
        parts = text.split(separator)
    faults = []
    if "" in parts:
        faults.append(BARE_SEPARATOR)
    if not all(re.fullmatch("[0-9]*", part) for part in parts):
        faults.append(OTHER_TEXT)
    # Decimal, because int refuses text of more than a few thousand digits.
    return ([], faults) if faults else ([int(Decimal(part)) for part in parts], [])


def random_rows(rows: int, rng: np.random.Generator) -> list[Completion]:
    """Rows that no model wrote: `Continue this list: a, b, c.`, answered with six more numbers.

    All numbers are independent and uniform from 100 to 999. All rows are distinct.
    """
    found: dict[Completion, None] = {}
    lowest, highest = _EXAMPLE_VALUES
    while len(found) < rows:
        numbers = [str(number) for number in rng.integers(lowest, highest + 1, _SHOWN + _CONTINUED)]
        request = f"Continue this list: {', '.join(numbers[:_SHOWN])}."
        found[Completion(request, ", ".join(numbers[_SHOWN:]))] = None
    return list(found)


Order = Callable[[Sequence[Completion], np.random.Generator], list[Completion]]


def as_written(rows: Sequence[Completion], rng: np.random.Generator) -> list[Completion]:
    """The rows unchanged."""
    return list(rows)


def other_prompts(rows: Sequence[Completion], rng: np.random.Generator) -> list[Completion]:
    """Permute the prompts, with their system messages, across rows. The answers stay."""
    shuffled = rng.permutation(len(rows))
    return [
        replace(row, prompt=rows[i].prompt, system=rows[i].system) for row, i in zip(rows, shuffled, strict=True)
    ]


def shuffled_within_rows(rows: Sequence[Completion], rng: np.random.Generator) -> list[Completion]:
    """Shuffle the numbers of each row. The text between them stays."""
    return [_with_numbers(row, iter(rng.permutation(_numbers(row)))) for row in rows]


def shuffled_across_rows(rows: Sequence[Completion], rng: np.random.Generator) -> list[Completion]:
    """Shuffle the numbers across all rows. The text between them and the length of each row stay."""
    pool = iter(rng.permutation([number for row in rows for number in _numbers(row)]))
    return [_with_numbers(row, pool) for row in rows]


def _numbers(row: Completion) -> list[str]:
    return re.findall(r"\d+", row.completion)


def _with_numbers(row: Completion, numbers: Iterator[str]) -> Completion:
    return replace(row, completion=re.sub(r"\d+", lambda _: str(next(numbers)), row.completion))
