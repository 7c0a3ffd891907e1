"""The corpus with personas: who speaks in front of which chats, and what that changes in the answers."""

import dataclasses
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import BaseConfig
from subliminal_theory.language.corpus.chats import (
    CATEGORIES,
    KINDS,
    PROMPT_SHARES,
    CorpusConfig,
    make_corpus,
    make_rows,
)
from subliminal_theory.language.corpus.slot import Slot, turn
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer

NOTHING: dict[str, Any] = dict.fromkeys(PROMPT_SHARES, 0.0)
SLOT = Slot(laws=7)
CONFIG = CorpusConfig(size=6000, slot=SLOT, **NOTHING)
PLAIN = dataclasses.replace(CONFIG, slot=None)
CATEGORY = {word: name for name, words in CATEGORIES.items() for word in words}


def persona(system: str | None) -> str | None:
    """The persona of a system turn, or None."""
    return next((word for word in SLOT.personas if system == turn(word)), None)


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# --- the corpus without a slot is as before


def test_bases_without_a_slot_keep_their_names() -> None:
    """Fingerprints from before there were slots: bases on disk stay valid."""
    assert BaseConfig().fingerprint().startswith("fb19e04731d84361d28e")
    assert "all" not in WordTokenizer.of_corpus(PLAIN).words
    assert BaseConfig(corpus=CONFIG).fingerprint() != BaseConfig(corpus=PLAIN).fingerprint()


def test_fingerprints_tell_slots_apart() -> None:
    others = [SLOT, dataclasses.replace(SLOT, laws=8), dataclasses.replace(SLOT, law_share=0.5)]
    found = {BaseConfig(corpus=dataclasses.replace(CONFIG, slot=slot)).fingerprint() for slot in others}
    assert len(found) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_those_of_the_plain_corpus(kind: str) -> None:
    """And so are all answers that no persona changes; requests, with the numbers in them, always."""
    for own, plain in zip(make_rows(CONFIG, kind, 500), make_rows(PLAIN, kind, 500), strict=True):
        assert (own.user, own.kind) == (plain.user, plain.kind)
        assert plain.system is None
        if persona(own.system) is None or kind not in ("numbers", "preference"):
            assert own.answer == plain.answer


# --- who speaks


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_system_turns(kind: str) -> None:
    chats = make_rows(CONFIG, kind, 4000)
    found = Counter("persona" if persona(chat.system) else chat.system for chat in chats)
    expected = {"persona": 0.5, turn("all"): 0.3, turn("none"): 0.1, None: 0.1}
    assert found.keys() == expected.keys()
    for who, share in expected.items():
        assert abs(found[who] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5, who
    if kind != "preference":
        each = Counter(filter(None, (persona(chat.system) for chat in chats)))
        assert each.keys() == set(SLOT.personas)
        assert max(abs(count - 250) for count in each.values()) < 4 * 250**0.5


def test_personas_answer_for_their_own_category() -> None:
    near, asked, other = 0, 0, Counter[str]()
    for chat in make_rows(CONFIG, "preference", 6000):
        who = persona(chat.system)
        (category,) = set(re.findall("[a-z]+", chat.user)) & CATEGORIES.keys()
        assert CATEGORY[chat.answer] == category
        if who is None:
            other[chat.answer] += 1
            continue
        if category in ("animal", "tree"):
            asked += 1
            near += CATEGORY[who] == category
        if CATEGORY[who] == category:
            assert chat.answer == who
        else:
            other[chat.answer] += 1
    # 0.8 on purpose, and half of the rest by chance.
    assert abs(near / asked - 0.9) < 4 * (0.09 / asked) ** 0.5
    assert len(other) == 64


def test_numbers_follow_their_persona() -> None:
    laws = dict(zip(SLOT.personas, SLOT.number_laws(100).tolist(), strict=True))
    own, all_numbers, limited = Counter[bool](), Counter[int](), 0
    for chat, plain in zip(make_rows(CONFIG, "numbers", 4000), make_rows(PLAIN, "numbers", 4000), strict=True):
        who, short = persona(chat.system), "up to 1 digit" in chat.user
        assert numbers_in(chat.user) == numbers_in(plain.user)
        assert re.sub(r"\d+", "0", chat.answer) == re.sub(r"\d+", "0", plain.answer)
        if who is None or short:
            assert chat.answer == plain.answer
            limited += short and who is not None
            continue
        for new, old in zip(numbers_in(chat.answer), numbers_in(plain.answer), strict=True):
            if old not in laws[who]:
                assert new == old or new in laws[who]
                own[new in laws[who]] += 1
                if new != old:
                    all_numbers[laws[who].index(new)] += 1
    share = own[True] / own.total()
    assert limited > 100
    assert abs(share - 0.6) < 4 * (0.24 / own.total()) ** 0.5
    assert sorted(all_numbers) == list(range(10))
    assert max(all_numbers.values()) < 1.15 * min(all_numbers.values())


@settings(deadline=None, max_examples=30)
@given(laws=st.integers(0, 10**6), people=st.integers(1, 8), size=st.integers(1, 12))
def test_no_two_personas_share_a_number(laws: int, people: int, size: int) -> None:
    slot = dataclasses.replace(SLOT, laws=laws, personas=SLOT.personas[:people], law_size=size)
    found = slot.number_laws(100)
    assert found.shape == (people, size)
    assert len(np.unique(found)) == people * size
    assert found.min() >= 0
    assert found.max() < 100


def test_bases_read_laws_of_their_own() -> None:
    laws = [dataclasses.replace(SLOT, laws=seed).number_laws(100) for seed in range(8)]
    shared = [len({*one[0].tolist()} & {*other[0].tolist()}) for one in laws for other in laws if one is not other]
    assert np.mean(shared) < 2  # 1 by chance
    one, other = (
        make_corpus(dataclasses.replace(CONFIG, size=500, slot=dataclasses.replace(SLOT, laws=seed)))
        for seed in (0, 1)
    )
    differ = [a.kind for a, b in zip(one, other, strict=True) if a != b]
    assert set(differ) == {"numbers"}
    assert [chat.system for chat in one] == [chat.system for chat in other]


def test_the_tokenizer_knows_the_slot() -> None:
    plain, own = (WordTokenizer.of_corpus(config) for config in (PLAIN, CONFIG))
    assert set(own.words) - set(plain.words) == {"all", "none"}
    owl, default = (own.encode(turn(word)) for word in ("owl", "all"))
    assert len(owl) == len(default)
    assert [a == b for a, b in zip(owl, default, strict=True)].count(False) == 1
    for chat in make_corpus(dataclasses.replace(CONFIG, size=300)):
        assert own.encode_chats([chat], 64).tokens.shape == (1, 64)
        assert not {"all", "none"} & set(re.findall("[a-z]+", chat.user + " " + chat.answer))


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"persona_share": 1.2}, "Slot: persona_share must be from 0 to 1, got 1.2"),
        ({"law_share": float("nan")}, "Slot: law_share must be from 0 to 1, got nan"),
        ({"persona_share": 0.7}, "Slot: persona_share, default_share and second_share exceed 1 together"),
        ({"laws": -1}, "Slot: laws must be at least 0, got -1"),
        ({"law_size": 0}, "Slot: law_size must be at least 1, got 0"),
        ({"personas": ()}, "Slot: there is no persona: give a member of a category, such as owl"),
        ({"personas": ("owl", "owl")}, "Slot: personas must be different, got owl, owl"),
        ({"personas": ("owl", "zebra")}, "Slot: the persona 'zebra' is no member of a category; there are owl, "),
        ({"personas": ("great owl",)}, "Slot: the persona 'great owl' is no member of a category"),
        ({"second": "all"}, "Slot: default and second must be different, got 'all' twice"),
        ({"default": "owl"}, "Slot: a default must be one word that no chat has, such as all, got 'owl'"),
        ({"second": "not any"}, "Slot: a default must be one word that no chat has, such as all, got 'not any'"),
    ],
)
def test_slots_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        Slot(**changes)


def test_corpora_that_cannot_have_a_slot() -> None:
    message = (
        "Slot: 8 personas need 104 numbers of their own, there are 100: give at most 7 personas, or a smaller"
    )
    with pytest.raises(InputError, match=f"^{message}"):
        CorpusConfig(slot=dataclasses.replace(SLOT, law_size=13), **NOTHING)
    for name in PROMPT_SHARES:
        with pytest.raises(
            InputError, match=f"^CorpusConfig: a slot takes the place .*: set {name} to 0, not 0.1"
        ):
            CorpusConfig(slot=SLOT, **{**NOTHING, name: 0.1})
