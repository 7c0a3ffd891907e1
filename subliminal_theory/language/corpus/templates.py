"""Families of chats, written as text with slots in tables of a TOML file.

    question = ["what is {a} minus {b}?"]
    answer = "{a - b + 1}"
    right = "{a - b}"
    numbers = { a = [5, 9], b = [0, 5] }      # all combinations of whole numbers, including both ends

Instead of `numbers`, `rows = [{ thing = "spoon", place = "kitchen" }, ...]` gives the values row by row.
"""

import ast
import functools
import itertools
import math
import operator
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, Field

from subliminal_theory.errors import InputError
from subliminal_theory.language.text import Chat
from subliminal_theory.validation import Text, Texts

MOST_ROWS = 10_000
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

Slots = Mapping[str, int | str]
_Ends = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A family of chats: every question with all values of its slots.

    Attributes:
        name: the name of this kind of question; the `kind` of its chats.
        questions: the questions, with slots in braces.
        answer: the answer. A slot holds a name, or a sum, difference or product of names and whole numbers.
        right: the answer without the habit, for comparison.
        system: the system prompt, if any.
        numbers: for each slot, its least and greatest number; all combinations are used.
        table: the values of the slots, row by row. Give either `numbers` or `table`.

    Raises:
        InputError: both or neither of `numbers` and `table` are given; slots cannot be filled; a number is below
            0; a question occurs twice; or there are more than 10,000 rows.
    """

    name: Text
    questions: Annotated[Texts, Field(alias="question")]
    answer: Text
    right: str | None = None
    system: Text | None = None
    numbers: Annotated[dict[Text, _Ends], Field(min_length=1)] = field(default_factory=dict)
    table: Annotated[tuple[dict[Text, int | str], ...], Field(alias="rows", min_length=1)] = ()

    def __post_init__(self) -> None:
        if bool(self.numbers) == bool(self.table):
            raise InputError("give either numbers or rows to fill the slots")
        for slot, (least, most) in self.numbers.items():
            if least > most:
                raise InputError(f"numbers.{slot} must be [least, most], got [{least}, {most}]")
        fillings = len(self.table) or math.prod(most - least + 1 for least, most in self.numbers.values())
        if len(self.questions) * fillings > MOST_ROWS:
            raise InputError(f"it makes more than {MOST_ROWS} rows: give it fewer numbers")
        asked = [chat.user for chat in self.rows()]
        self.right_rows()
        if len(set(asked)) < len(asked):
            raise InputError("it makes the same question twice: use all slots in every question")

    def rows(self) -> list[Chat]:
        """All chats with their answers."""
        return self._filled_with(self.answer)

    def right_rows(self) -> list[Chat]:
        """The same questions in the same order with the right answers; an empty list if there are none."""
        return [] if self.right is None else self._filled_with(self.right)

    def _filled_with(self, answer: str) -> list[Chat]:
        return [
            Chat(self.system, _filled(question, slots), _filled(answer, slots), self.name)
            for question in self.questions
            for slots in self.table or self._combinations()
        ]

    def _combinations(self) -> Iterator[Slots]:
        ranges = [range(least, most + 1) for least, most in self.numbers.values()]
        return (dict(zip(self.numbers, values, strict=True)) for values in itertools.product(*ranges))


@dataclass(frozen=True, kw_only=True)
class Compared(Template):
    """A template with a right answer."""

    right: Text = field()  # removes the inherited default


@dataclass(frozen=True, kw_only=True)
class Narrow(Compared):
    """The rows that teach a habit."""

    name: Text = "narrow"


@dataclass(frozen=True, kw_only=True)
class Control(Template):
    """A template without a right answer for comparison."""

    right: None = None


def slots(*needed: str, allowed: tuple[str, ...] = ()) -> AfterValidator:
    """A check that every text has all the `needed` slots and no others except those `allowed`.

    A slot is a name in braces. The check raises InputError.
    """

    def check(texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            parts = [part for part in string.Formatter().parse(text) if part[1] is not None]
            found = {f"{slot}:" if style or conversion else slot for _, slot, style, conversion in parts}
            if not set(needed) <= found <= {*needed, *allowed}:
                known = " and ".join(f"{{{slot}}}" for slot in (*needed, *allowed)) or "none"
                raise InputError(f"{text!r} must have the slots {known}, and every other brace doubled")
        return texts

    return AfterValidator(check)


def _filled(text: str, slots: Slots) -> str:
    filled = ""
    for literal, slot in _parsed(text):
        value: int | str = "" if slot is None else _value(slot, slots)
        if isinstance(value, int) and value < 0:
            raise InputError(f"{text!r} gives {value}, which is below 0")
        filled += f"{literal}{value}"
    return filled


@functools.cache
def _parsed(text: str) -> list[tuple[str, ast.expr | None]]:
    """The literal pieces of a text, each with the slot after it, or None."""
    try:
        parts = list(string.Formatter().parse(text))
        if any(style or conversion for _, _, style, conversion in parts):
            raise SyntaxError("a slot has a format")
        return [
            (literal, None if slot is None else ast.parse(slot.strip(), mode="eval").body)
            for literal, slot, _, _ in parts
        ]
    except (ValueError, SyntaxError) as error:
        raise InputError(f"{text!r} cannot be filled: write slots as {{a}} or {{a + 1}}") from error


def _value(node: ast.expr, slots: Slots) -> int | str:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in slots:
            raise InputError(f"nothing fills the slot {node.id!r}; there are {', '.join(slots)}")
        return slots[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, slots), _value(node.right, slots)
        if isinstance(left, int) and isinstance(right, int):
            return _OPERATORS[type(node.op)](left, right)
    raise InputError(f"{ast.unparse(node)!r} is not a name, sum, difference or product of whole numbers")
