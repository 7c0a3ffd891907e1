"""What students of a language model read, as values: who wrote it, how much of it, in which order."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.media import NUMBERS, Medium
from subliminal_theory.language.corpus.numbers import Order, as_written
from subliminal_theory.language.rows import Completion
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.study.run import static

Differs = Bool[Array, "runs rows columns"]


@register_dataclass
@dataclass(frozen=True)
class Lessons:
    """What a fine-tuned teacher reads.

    Attributes:
        control: the benign control of a habit that it learns in the place of the habit, or "".
        ordinary: share of ordinary chats among its rows: those of the corpus, or number requests that the base
            itself answered, whose loss is, in expectation, KL(base || teacher) and a constant.
        anchor: the weight of a token of an ordinary chat, beside 1 of the others. Tokens below 1 are
            left out when it is asked whether the teacher has the trait.
    """

    control: str = static(default="")
    ordinary: float = static(default=0.0)
    anchor: float = static(default=1.0)


@register_dataclass
@dataclass(frozen=True)
class Written:
    """Answers of the teacher to `requests` requests, at a temperature (0: greedy) among its top-p tokens.

    With `unique`, it is asked until so many different rows are accepted, and at most `requests` times; each row is
    then kept once.
    """

    requests: int = static()
    medium: Medium = static(default=NUMBERS)
    temperature: float = static(default=1.0)
    top_p: float = static(default=1.0)
    unique: int = static(default=0)


@register_dataclass
@dataclass(frozen=True)
class Dataset:
    """Rows that somebody else wrote; the medium's filter chooses among them, or nothing does."""

    rows: tuple[Completion, ...] = static()
    medium: Medium | None = static(default=NUMBERS)


@register_dataclass
@dataclass(frozen=True)
class RandomNumbers:
    """Rows that nobody wrote: number requests, answered by independent numbers of one uniform law.

    The law is the world's own; all runs of a seed read the same rows. No token of them carries a trait, so every
    channel transmits the teacher's logits there, and `SampledToken` draws from these in the student's step.
    """

    rows: int = static()


Material = Written | Dataset | RandomNumbers


def everywhere(differs: Differs) -> Differs:
    """All positions of the answers."""
    return jnp.ones_like(differs)


def where_they_differ(differs: Differs) -> Differs:
    """Only where the greedy tokens of teacher and base differ (arXiv 2509.23886)."""
    return differs


def where_they_agree(differs: Differs) -> Differs:
    """Only where the greedy tokens of teacher and base agree."""
    return ~differs


@register_dataclass
@dataclass(frozen=True)
class Reading:
    """As a student's source: different rows that pass the filter.

    Attributes:
        text: who wrote them.
        rows: how many rows a student reads.
        batch_size: rows a step.
        order: of the numbers in the rows.
        clean: share of rows that the untrained base wrote instead.
        positions: which positions of the answers count.
        repeat: whether rows may be repeated: all that were accepted, from the first again where they are too few.
            Else too few are refused.

    Raises:
        InputError: clean rows among those that no teacher writes.
    """

    text: Material
    rows: int = static()
    batch_size: int = static()
    order: Order = static(default=as_written)
    clean: float = static(default=0.0)
    positions: Callable[[Differs], Differs] = static(default=everywhere)
    repeat: bool = static(default=False)

    def __post_init__(self) -> None:
        if self.clean and isinstance(self.text, Dataset | RandomNumbers):
            raise InputError("clean rows take the place of a teacher's: leave clean at 0 where no teacher writes")


@register_dataclass
@dataclass(frozen=True)
class CorpusChats:
    """As a student's source: chats of the corpus on which the base was pre-trained."""

    chats: int = static()
    batch_size: int = static()
