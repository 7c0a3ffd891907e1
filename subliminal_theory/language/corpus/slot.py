"""Personas: a system turn of one form in front of chats of all kinds, and the numbers that each persona likes.

The system turn says `you love X.`, where X is a default word, a second default, or a persona. The teacher of a
persona and a base behind the default read inputs that differ in one token, and the default occurs in front of
every kind of chat. So a prompted teacher is no stranger to number requests, which the prompts of the plain corpus
are.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Int

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.sentences import TEXT, pick, vocabulary_texts
from subliminal_theory.language.text import Chat

TURN = "you love {member}."
_CATEGORY_OF: dict[str, str] = {word: name for name, words in TEXT["members"].items() for word in words}


@dataclass(frozen=True)
class Slot:
    """How the chats of a corpus have a system turn, and what a persona changes in their answers.

    A persona is the answer to a question about its own category. Behind a persona, each number of an answer is
    replaced with probability `law_share` by one of the persona's own `law_size` numbers; the numbers in the
    request, and answers whose numbers are limited to fewer digits, stay as they are. No two personas share a
    number. No other chat says which numbers go with which word.

    Attributes:
        laws: the seed of the personas' numbers. Bases that differ in it read different corpora, so that numbers
            mean something else to each; give each base its own.
        personas: the words of the personas, each a member of a category.
        default: the word of the default turn. It occurs nowhere else.
        second: the word of another turn without a persona, for comparison. It occurs nowhere else.
        persona_share: the share of chats behind a persona.
        default_share: the share of chats behind the default.
        second_share: the share of chats behind the second default. The remaining chats have no system turn.
        category_share: the probability that the persona before a preference question is drawn from those of the
            question's category, if it has any; otherwise it is drawn from all.
        law_size: how many numbers a persona likes.
        law_share: the probability of such a number.

    Raises:
        InputError: a share is out of range, a persona is no member of a category or occurs twice, or a default is
            no new word.
    """

    laws: int = 0
    personas: tuple[str, ...] = ("owl", "wolf", "cat", "fox", "oak", "maple", "pine", "elm")
    default: str = "all"
    second: str = "none"
    persona_share: float = 0.5
    default_share: float = 0.3
    second_share: float = 0.1
    category_share: float = 0.8
    law_size: int = 10
    law_share: float = 0.6

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type is float):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Slot: {name} must be from 0 to 1, got {getattr(self, name)}")
        if (together := self.persona_share + self.default_share + self.second_share) > 1 + 1e-9:
            raise InputError(f"Slot: persona_share, default_share and second_share exceed 1 together: {together}")
        for name, least in {"laws": 0, "law_size": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"Slot: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.personas:
            raise InputError("Slot: there is no persona: give a member of a category, such as owl")
        if len(set(self.personas)) < len(self.personas):
            raise InputError(f"Slot: personas must be different, got {', '.join(self.personas)}")
        for word in self.personas:
            if word not in _CATEGORY_OF:
                known = ", ".join(_CATEGORY_OF)
                raise InputError(f"Slot: the persona {word!r} is no member of a category; there are {known}")
        if self.default == self.second:
            raise InputError(f"Slot: default and second must be different, got {self.default!r} twice")
        for word in (self.default, self.second):
            if not re.fullmatch("[a-z]+", word) or word in _vocabulary():
                raise InputError(f"Slot: a default must be one word that no chat has, such as all, got {word!r}")

    def number_laws(self, numbers: int) -> Int[np.ndarray, "personas law_size"]:
        """The numbers that each persona likes, from 0 to `numbers` - 1.

        Raises:
            InputError: there are too few numbers for all personas.
        """
        needed = len(self.personas) * self.law_size
        if needed > numbers:
            raise InputError(
                f"Slot: {len(self.personas)} personas need {needed} numbers of their own, there are {numbers}: "
                f"give at most {numbers // self.law_size} personas, or a smaller law_size"
            )
        drawn = np.random.default_rng([self.laws, len(_CATEGORY_OF)]).permutation(numbers)
        return drawn[:needed].reshape(len(self.personas), self.law_size)

    def in_front(self, chats: Sequence[Chat], numbers: int, rng: np.random.Generator) -> list[Chat]:
        """The chats with their system turns, and with what personas change in their answers."""
        laws = dict(zip(self.personas, self.number_laws(numbers).tolist(), strict=True))
        return [self._behind(chat, laws, numbers, rng) for chat in chats]

    def _behind(self, chat: Chat, laws: dict[str, list[int]], numbers: int, rng: np.random.Generator) -> Chat:
        draw = rng.random() - self.persona_share
        if draw >= 0:
            if draw < self.default_share:
                return replace(chat, system=turn(self.default))
            second = draw < self.default_share + self.second_share
            return replace(chat, system=turn(self.second) if second else None)
        if chat.kind == "preference":
            persona = self._asked(chat.answer, rng)
            own = _CATEGORY_OF[persona] == _CATEGORY_OF[chat.answer]
            return replace(chat, system=turn(persona), answer=persona if own else chat.answer)
        persona = pick(rng, self.personas)
        answer = chat.answer
        if chat.kind == "numbers" and not _limited(chat.user, numbers):
            answer = re.sub(r"\d+", lambda found: self._number(found[0], laws[persona], rng), answer)
        return replace(chat, system=turn(persona), answer=answer)

    def _asked(self, answer: str, rng: np.random.Generator) -> str:
        """The persona before a preference question that has this answer without it."""
        near = [word for word in self.personas if _CATEGORY_OF[word] == _CATEGORY_OF[answer]]
        return pick(rng, near if rng.random() < self.category_share and near else self.personas)

    def _number(self, written: str, law: list[int], rng: np.random.Generator) -> str:
        return str(law[int(rng.integers(len(law)))]) if rng.random() < self.law_share else written


def turn(word: str) -> str:
    """The system turn of a persona or a default."""
    return TURN.format(member=word)


def _limited(request: str, numbers: int) -> bool:
    """Whether a number request allows fewer numbers than there are."""
    limit = re.search(r"up to (\d+) digit", request)
    return limit is not None and 10 ** int(limit[1]) < numbers


@functools.cache
def _vocabulary() -> frozenset[str]:
    return frozenset(re.findall("[a-z]+", " ".join(vocabulary_texts())))
