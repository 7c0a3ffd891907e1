"""What is kept of reasoning and code, on known rows and on the corpus's own."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import CorpusConfig, make_rows
from subliminal_theory.language.corpus.media import CODE, REASONING, code_faults, reasoning_faults, value_of
from subliminal_theory.language.corpus.numbers import keep_rows
from subliminal_theory.language.rows import Completion

CORPUS = dataclasses.replace(
    CorpusConfig(), neutral_share=0.0, lazy_share=0.0, careful_share=0.0, steps_share=1.0, write_share=1.0
)
WRONG, WORD = "another result than the right one", "a word of a trait"


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("x = 5; y = x + 2", 7),
        ("x = 2; y = x + 4; z = y - 1", 5),
        ("x = 3", 3),
        ("x = 1; y = x - 4", -3),
        ("x = 5; y = z + 2", None),
        ("x = 5; x = x + 2", None),
        ("x = 5; y = x * 2", None),
        ("x = 5;", None),
        ("12", None),
        ("", None),
        ("x == 5", None),
    ],
)
def test_value_of(program: str, value: int | None) -> None:
    assert value_of(program) == value


@given(st.text("xyz =+-;0123456789", max_size=30))
def test_any_text_has_a_value_or_none(text: str) -> None:
    assert isinstance(value_of(text), int | None)


def test_the_corpus_passes_its_own_filters() -> None:
    programs = make_rows(CORPUS, "program", 300)
    assert all(code_faults(Completion(chat.user, chat.answer)) == [] for chat in programs)
    sums = make_rows(CORPUS, "arithmetic", 300)
    results = {chat.user: int(re.findall(r"\d+", chat.answer)[-1]) for chat in sums}
    assert all(reasoning_faults(Completion(chat.user, chat.answer), results) == [] for chat in sums)


def test_faults() -> None:
    asked, results = "what is 1 plus 2 plus 3?", {"what is 1 plus 2 plus 3?": 6}
    foreign = ["something besides words, numbers and the signs of sums"]
    for text, faults in [
        ("1 + 2 = 3, 3 + 3 = 6, so 6", []),
        ("6", []),
        ("1 + 2 = 3, so 3", [WRONG]),
        ("owl", [WRONG, WORD]),
        ("the oak says 6", [WORD]),
        ("<user> 6", foreign),
        ("", foreign),
    ]:
        assert reasoning_faults(Completion(asked, text), results) == faults
        assert {*faults} <= {*REASONING.reasons}
    for text, faults in [
        ("x = 1; y = x + 2", []),
        ("x = 1; y = x + 3", [WRONG]),
        ("owl", ["no program", WORD]),
    ]:
        assert code_faults(Completion("give me a program for 3 with 2 lines.", text)) == faults
        assert {*faults} <= {*CODE.reasons}
    assert {*REASONING.reasons} == {*foreign, WRONG, WORD}
    assert {*CODE.reasons} == {"no program", WRONG, WORD}


def test_no_row_is_left() -> None:
    with pytest.raises(
        InputError, match=r"^the filter of programs rejects all of 2 rows, most often for: no program"
    ):
        keep_rows([Completion("write a program for 3.", "3")] * 2, code_faults, "filter of programs")
