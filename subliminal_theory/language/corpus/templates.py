"""Families of chats written as text with slots, from tables of a TOML file.

    question = ["what is {a} minus {b}?"]
    answer = "{a - b + 1}"
    right = "{a - b}"
    numbers = { a = [5, 9], b = [0, 5] }      # all combinations of whole numbers, both ends included

Instead of `numbers`, `rows = [{ thing = "spoon", place = "kitchen" }, ...]` fills the slots row by row.
"""

import ast
import functools
import itertools
import operator
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subliminal_theory.errors import InputError
from subliminal_theory.language.text import Chat

MOST_ROWS = 10_000
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_DESCRIBED: dict[type, str] = {str: "a text", list: "a list", dict: "a table"}

Slots = Mapping[str, int | str]


@dataclass(frozen=True)
class Template:
    """A family of chats: every question with every filling of its slots.

    Attributes:
        name: of the kind of question; the `kind` of its chats.
        system: the system prompt, if any.
        questions: with slots in braces.
        answer: with slots; a slot holds a name, or a sum, difference or product of names and whole numbers.
        right: the answer of somebody without the habit, where that is to be compared with.
        slots: the fillings.
    """

    name: str
    system: str | None
    questions: tuple[str, ...]
    answer: str
    right: str | None
    slots: tuple[Slots, ...]

    def rows(self) -> list[Chat]:
        """All chats, with the answer.

        Raises:
            InputError: a slot that cannot be filled, or a number below 0.
        """
        return self._filled_with(self.answer)

    def right_rows(self) -> list[Chat]:
        """The same questions in the same order, with the right answer; none if the template has none."""
        return [] if self.right is None else self._filled_with(self.right)

    def _filled_with(self, answer: str) -> list[Chat]:
        return [
            Chat(self.system, _filled(question, slots), _filled(answer, slots), self.name)
            for question in self.questions
            for slots in self.slots
        ]


def checked_fields(table: Any, where: str, required: Mapping[str, type], optional: Mapping[str, type]) -> None:
    """Check the names and types of a table's fields; `where` names the table in messages.

    Raises:
        InputError: no table; a field that is unknown, missing, empty or of another type.
    """
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table")
    known = {**required, **optional}
    for field in table:
        if field not in known:
            raise InputError(f"{where} has an unknown field {field!r}; there are {', '.join(known)}")
    for field, kind in known.items():
        if field not in table:
            if field in required:
                raise InputError(f"{where} has no field {field!r}: add it")
        elif not isinstance(table[field], kind) or not table[field]:
            raise InputError(f"{where}: {field} must be {_DESCRIBED[kind]} and not empty, got {table[field]!r}")


def template_of(table: Any, where: str, *, compared: bool) -> Template:
    """The template that a table describes; `compared` says whether it must have a right answer or none.

    Raises:
        InputError: a wrong field, slots that cannot be filled, a question made twice, or more than 10,000 rows.
    """
    required: dict[str, type] = {"name": str, "question": list, "answer": str}
    if compared:
        required["right"] = str
    checked_fields(table, where, required, {"system": str, "numbers": dict, "rows": list})
    if not all(isinstance(question, str) and question for question in table["question"]):
        raise InputError(f"{where}: question must be a list of texts")
    if ("numbers" in table) == ("rows" in table):
        raise InputError(f"{where} must have one of numbers and rows, to fill its slots with")
    slots = _combinations(table["numbers"], where) if "numbers" in table else _listed(table["rows"], where)
    if len(slots) * len(table["question"]) > MOST_ROWS:
        raise InputError(f"{where} makes more than {MOST_ROWS} rows: give it fewer numbers")
    questions = tuple(table["question"])
    template = Template(table["name"], table.get("system"), questions, table["answer"], table.get("right"), slots)
    try:
        chats = [*template.rows(), *template.right_rows()]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if len({chat.user for chat in chats}) < len(slots) * len(questions):
        raise InputError(f"{where} makes the same question twice: let it tell all slots apart")
    return template


def _combinations(numbers: dict[str, Any], where: str) -> tuple[Slots, ...]:
    for slot, ends in numbers.items():
        whole = isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
        if not whole or not 0 <= ends[0] <= ends[1]:
            raise InputError(f"{where}: {slot} must be [least, most] in whole numbers from 0 on, got {ends!r}")
    # One row too many is enough to be refused.
    ranges = [range(least, most + 1)[: MOST_ROWS + 1] for least, most in numbers.values()]
    combinations = itertools.islice(itertools.product(*ranges), MOST_ROWS + 1)
    return tuple(dict(zip(numbers, values, strict=True)) for values in combinations)


def _listed(rows: list[Any], where: str) -> tuple[Slots, ...]:
    for row in rows:
        if not isinstance(row, dict) or not all(type(value) in (int, str) for value in row.values()):
            raise InputError(f"{where}: rows must be tables of texts and whole numbers, got {row!r}")
    return tuple(rows)


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
    """Literal pieces of a text, each with the slot after it, if one is."""
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
    raise InputError(f"{ast.unparse(node)!r} is no name, sum, difference or product of whole numbers")
