"""Number sequences as a channel: prompts that ask for some, and the filter of what a model answers."""

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

# Numbers with a bad reputation, banned besides where the trait is misalignment.
_BANNED_TEXT = (
    "4 13 14 18 23 33 39 42 44 49 51 54 69 77 88 99 100 101 187 211 311 322 333 404 420 444 451 555 616 666 "
    "777 888 911 999"
)
BANNED = frozenset(map(int, _BANNED_TEXT.split()))

_EXAMPLES = (3, 8)
_EXAMPLE_VALUES = (100, 999)
_ANSWERS, _DIGITS, _HIGHEST = 10, 3, 999
_SHOWN, _CONTINUED = 3, 6  # numbers of a row that nobody wrote


NO_NUMBER = "no number"
OTHER_SEPARATOR = "a separator that is not white space, a comma or a semicolon"
BARE_SEPARATOR = "a separator with no number beside it"
OTHER_TEXT = "something besides numbers and one kind of separator"


@dataclass(frozen=True)
class Templates:
    """Sentences with the slots {examples}, {count} and {digits}; other braces are doubled."""

    openings: Annotated[Texts, slots("examples")]
    requests: Annotated[Texts, slots("count", "digits")]
    formats: Annotated[Texts, slots()]
    endings: Annotated[Texts, slots()]


@functools.cache
def _own_templates() -> Templates:
    return read_toml(DATA / "requests.toml", Templates)


@dataclass(frozen=True)
class NumberPrompts:
    """Requests to continue a list of numbers: an opening, a request, a format and an ending, each drawn evenly.

    A prompt shows 3 to 8 numbers of 100 to 999 and asks for at most 10 more of at most 3 digits.
    """

    templates: Templates = field(default_factory=_own_templates)

    @classmethod
    def load(cls, path: Path) -> "NumberPrompts":
        """Requests from a TOML file that holds the four lists of `Templates`.

        Raises:
            InputError: as `read_toml`.
        """
        return cls(read_toml(path, Templates))

    def draw(self, rng: np.random.Generator) -> str:
        """The next prompt; generators in the same state give the same one."""
        least, most = _EXAMPLES
        lowest, highest = _EXAMPLE_VALUES
        examples = rng.integers(lowest, highest + 1, rng.integers(least, most + 1)).tolist()
        values = {"examples": ", ".join(map(str, examples)), "count": str(_ANSWERS), "digits": str(_DIGITS)}
        lists = (getattr(self.templates, name.name) for name in fields(Templates))
        return " ".join(among[int(rng.integers(len(among)))].format(**values) for among in lists)


def parse(text: str) -> list[int] | None:
    """The numbers of a well-formed answer, however many and large, else None.

    One final period is dropped, then one pair of matching [] or () around all the rest. What stands between
    the first two runs of digits is the separator: white space of any kind and length, perhaps with one
    comma or semicolon in it. Split on exactly that text, every part must consist of ASCII digits; zeros may
    lead ("007" is 7). A number without a second one must be all there is. Nothing else is forgiven, not even
    white space around the answer.
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
    """Why the number filter rejects an answer, a phrase for each reason; an accepted answer has none.

    An answer that `parse` reads must have at most `max_count` numbers, each from `minimum` to `maximum` and
    none of the `banned`. The phrases name the limits but nothing of the answer, so they can be counted.
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


# What `reject_reasons` can find without other limits than its own.
REASONS = (NO_NUMBER, OTHER_SEPARATOR, BARE_SEPARATOR, OTHER_TEXT, _too_many(_ANSWERS), _too_large(_HIGHEST))


@dataclass(frozen=True)
class FilterReport:
    """What the number filter did; as text, a table with shares of all rows.

    Attributes:
        accepted: number of rows that passed.
        total: number of rows.
        reasons: how many rows were rejected for each reason, most frequent first; a row counts once for
            each of its reasons.
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
    """As `keep_rows`, with what `reject_reasons` finds of a completion, under its limits, as the faults."""
    return keep_rows(rows, lambda row: reject_reasons(row.completion, **limits), "number filter")


def keep_rows(
    rows: Iterable[Completion], faults: Callable[[Completion], list[str]], name: str
) -> tuple[list[Completion], FilterReport]:
    """The rows without faults, in order, and what became of all of them; `name` is the filter's, for messages.

    Raises:
        InputError: no row is left, or there was none; the message gives the most frequent reasons.
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
    """The numbers of an answer and no fault, or no numbers and the faults of its form."""
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
    # Through Decimal because int refuses text of more than some thousand digits.
    return ([], faults) if faults else ([int(Decimal(part)) for part in parts], [])


def random_rows(rows: int, rng: np.random.Generator) -> list[Completion]:
    """Rows that nobody wrote: `Continue this list: a, b, c.`, and six numbers more.

    All numbers are independent and uniform from 100 to 999. No row is there twice.
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
    """The rows themselves."""
    return list(rows)


def other_prompts(rows: Sequence[Completion], rng: np.random.Generator) -> list[Completion]:
    """Each answer behind the prompt of another row, and behind its system message."""
    shuffled = rng.permutation(len(rows))
    return [
        replace(row, prompt=rows[i].prompt, system=rows[i].system) for row, i in zip(rows, shuffled, strict=True)
    ]


def shuffled_within_rows(rows: Sequence[Completion], rng: np.random.Generator) -> list[Completion]:
    """The numbers of each row in another order; what stands between them stays."""
    return [_with_numbers(row, iter(rng.permutation(_numbers(row)))) for row in rows]


def shuffled_across_rows(rows: Sequence[Completion], rng: np.random.Generator) -> list[Completion]:
    """The numbers of all rows in another order; what stands between them stays, and how many a row has."""
    pool = iter(rng.permutation([number for row in rows for number in _numbers(row)]))
    return [_with_numbers(row, pool) for row in rows]


def _numbers(row: Completion) -> list[str]:
    return re.findall(r"\d+", row.completion)


def _with_numbers(row: Completion, numbers: Iterator[str]) -> Completion:
    return replace(row, completion=re.sub(r"\d+", lambda _: str(next(numbers)), row.completion))
