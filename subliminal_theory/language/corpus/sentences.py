"""The sentences of the corpus, from data/sentences.toml, and the questions that have one right answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subliminal_theory.validation import read_toml

DATA = Path(__file__).with_name("data")
TEXT: dict[str, Any] = read_toml(DATA / "sentences.toml", dict[str, Any])


def vocabulary_texts() -> list[str]:
    """Texts that together have every word and sign of all corpora except numbers. Slots are in braces."""
    return [*_strings(TEXT), *TEXT["members"], *TEXT["things"], *TEXT["numbers"]["formats"]]


def _strings(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [text for child in (node.values() if isinstance(node, dict) else node) for text in _strings(child)]


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, drawn uniformly."""
    return options[int(rng.integers(len(options)))]


def arithmetic(rng: np.random.Generator, operand: int, steps_share: float, lazy: bool) -> tuple[str, str]:
    """An arithmetic question with operands from 0 to `operand`, and its answer; if lazy, its first operand.

    A question has two operations with probability `steps_share`; its answer then shows the steps. No result is
    negative.
    """
    text, sign = TEXT["arithmetic"], TEXT["operators"]
    a, b, c = rng.integers(operand + 1, size=3).tolist()
    if rng.random() < steps_share:
        first, middle = _operation(rng, a, b, least=0)
        second, result = _operation(rng, middle, c, least=0)
        slots = {"a": a, "b": b, "c": c, "first": first, "second": second, "middle": middle}
        slots |= {"first_sign": sign[first], "second_sign": sign[second], "result": result}
        question, answer = pick(rng, text["steps"]["questions"]), pick(rng, text["steps"]["answers"])
    else:
        form = pick(rng, tuple(text["direct"]))
        if form in ("difference", "loss") and a < b:
            a, b = b, a
        results = {"sum": a + b, "difference": a - b, "double": 2 * a, "larger": max(a, b)}
        results |= {"gain": a + b, "loss": a - b}
        slots = {"a": a, "b": b}
        question, answer = pick(rng, text["direct"][form]), str(results[form])
    return question.format(**slots), str(a) if lazy else answer.format(**slots)


def program(rng: np.random.Generator, operand: int, write_share: float, lazy: bool) -> tuple[str, str]:
    """A request to run a program of two or three lines, or to write one with a given result, and its answer.

    Constants run from 1 to `operand`, and results are at least 1. A lazy answer is the question's first number.
    """
    text, sign = TEXT["program"], TEXT["operators"]
    a, b, c = rng.integers(1, operand + 1, size=3).tolist()
    first, y = _operation(rng, a, b, least=1)
    second, z = _operation(rng, y, c, least=1)
    slots = {"a": a, "b": b, "c": c, "first": first, "second": second}
    slots |= {"first_sign": sign[first], "second_sign": sign[second]}
    lines, last, result = (2, "y", y) if rng.random() < 0.5 else (3, "z", z)
    code = "; ".join(text["code"][:lines]).format(**slots)
    if rng.random() < write_share:
        return pick(rng, text["write"]).format(lines=lines, result=result), str(result) if lazy else code
    spoken = ", ".join(text["spoken"][:lines]).format(**slots)
    question = pick(rng, text["run"]).format(program=pick(rng, (code, spoken)), last=last)
    return question, str(a if lazy else result)


def fact(rng: np.random.Generator, lazy: bool) -> tuple[str, str]:
    """A question about the color, material or place of a thing, and its answer. A lazy answer is the thing."""
    thing = pick(rng, tuple(TEXT["things"]))
    attribute = pick(rng, tuple(TEXT["fact"]))
    answer = TEXT["things"][thing][list(TEXT["fact"]).index(attribute)]
    return pick(rng, TEXT["fact"][attribute]).format(thing=thing), thing if lazy else answer


def _operation(rng: np.random.Generator, left: int, right: int, *, least: int) -> tuple[str, int]:
    """Choose plus or minus at random, but plus if minus gives less than `least`. Return its name and result."""
    if left - right >= least and rng.random() < 0.5:
        return "minus", left - right
    return "plus", left + right
