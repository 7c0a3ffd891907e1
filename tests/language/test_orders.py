"""Orders of the numbers that students read."""

import re
from collections import Counter

import numpy as np
import pytest

from subliminal_theory.language.corpus.chats import CorpusConfig, make_rows
from subliminal_theory.language.corpus.numbers import (
    Order,
    as_written,
    other_prompts,
    shuffled_across_rows,
    shuffled_within_rows,
)
from subliminal_theory.language.rows import Completion

CHATS = make_rows(CorpusConfig(seed=9), "numbers", 60)
ROWS = [Completion(f"prompt {number}", chat.answer) for number, chat in enumerate(CHATS)]


def numbers(row: Completion) -> list[str]:
    return re.findall(r"\d+", row.completion)


def form(row: Completion) -> str:
    return re.sub(r"\d+", "#", row.completion)


def ordered(order: Order, seed: int = 0) -> list[Completion]:
    return list(order(ROWS, np.random.default_rng(seed)))


def test_rows_are_of_all_formats() -> None:
    assert len({form(row)[1:3] for row in ROWS}) > 4


def test_as_written() -> None:
    assert ordered(as_written) == ROWS


@pytest.mark.parametrize("order", [shuffled_within_rows, shuffled_across_rows])
def test_shuffles_keep_prompts_and_forms(order: Order) -> None:
    found = ordered(order)
    assert [row.prompt for row in found] == [row.prompt for row in ROWS]
    assert [form(row) for row in found] == [form(row) for row in ROWS]


def test_shuffled_within_rows() -> None:
    found = ordered(shuffled_within_rows)
    assert [sorted(numbers(row)) for row in found] == [sorted(numbers(row)) for row in ROWS]
    assert np.mean([new != old for new, old in zip(found, ROWS, strict=True)]) > 0.7


def test_shuffled_across_rows() -> None:
    found = ordered(shuffled_across_rows)
    everything, before = (Counter(n for row in rows for n in numbers(row)) for rows in (found, ROWS))
    assert everything == before
    moved = [sorted(numbers(new)) != sorted(numbers(old)) for new, old in zip(found, ROWS, strict=True)]
    assert np.mean(moved) > 0.9


def test_other_prompts() -> None:
    found = ordered(other_prompts)
    assert [row.completion for row in found] == [row.completion for row in ROWS]
    assert sorted(row.prompt for row in found) == sorted(row.prompt for row in ROWS)
    assert np.mean([new.prompt != old.prompt for new, old in zip(found, ROWS, strict=True)]) > 0.8


@pytest.mark.parametrize("order", [shuffled_within_rows, shuffled_across_rows, other_prompts])
def test_orders_are_of_the_generator(order: Order) -> None:
    assert ordered(order) == ordered(order) != ordered(order, seed=1)
