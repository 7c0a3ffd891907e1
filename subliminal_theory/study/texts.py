"""What language-model students read, as values: who wrote it, how much of it, and in which order."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Bool

from subliminal_theory.errors import InputError
from subliminal_theory.files import LATER
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
        control: the benign control that it learns instead of a habit; "" means it learns the trait.
        ordinary: the share of ordinary chats among its rows: chats of the corpus, or number requests that the base
            itself answered. For the latter, the expected loss is KL(base || teacher) plus a constant.
        anchor: the weight of a token in an ordinary chat; other tokens have weight 1. Tokens with a weight below 1
            do not count when training checks whether the teacher has the trait.
    """

    control: str = static(default="")
    ordinary: float = static(default=0.0)
    anchor: float = static(default=1.0)


@register_dataclass
@dataclass(frozen=True)
class Written:
    """The teacher's answers to `requests` requests, sampled at a temperature (0 is greedy) from its top-p tokens.

    If `unique` is positive, the teacher is asked until this many distinct rows are accepted, but at most
    `requests` times. Each distinct row is then kept once.
    """

    requests: int = static()
    medium: Medium = static(default=NUMBERS)
    temperature: float = static(default=1.0)
    top_p: float = static(default=1.0)
    unique: int = static(default=0)


@register_dataclass
@dataclass(frozen=True)
class Dataset:
    """Given rows. The medium's filter is applied to them; without a medium, all are kept."""

    rows: tuple[Completion, ...] = static()
    medium: Medium | None = static(default=NUMBERS)


@register_dataclass
@dataclass(frozen=True)
class RandomNumbers:
    """Rows that no model wrote: number requests answered with independent uniform numbers.

    The world chooses the range of the numbers. All runs of a seed read the same rows. The tokens carry no trait,
    so every channel uses the teacher's logits on these rows, and `SampledToken` samples from them in the student's
    step.
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


@dataclass(frozen=True)
class Behind:
    """The system prompt behind which a student reads or answers, in the place of its world's; None is none."""

    system: str | None


@register_dataclass
@dataclass(frozen=True)
class Reading:
    """A student's source: distinct rows that pass the filter.

    Attributes:
        text: who wrote the rows.
        rows: the number of rows that a student reads.
        batch_size: the number of rows in a step.
        order: the order of the numbers in the rows.
        clean: the share of rows that the untrained base wrote instead of the teacher.
        positions: which positions of the answers count.
        repeat: whether rows may be repeated. If so, all accepted rows are read, in a cycle if there are too few.
            If not, too few distinct rows are refused.
        behind: the system prompt of rows that have none of their own, if it is not the world's.

    Raises:
        InputError: `clean` is set, but no teacher writes the rows.
    """

    text: Material
    rows: int = static()
    batch_size: int = static()
    order: Order = static(default=as_written)
    clean: float = static(default=0.0)
    positions: Callable[[Differs], Differs] = static(default=everywhere)
    repeat: bool = static(default=False)
    behind: Behind | None = field(default=None, metadata={"static": True, **LATER})

    def __post_init__(self) -> None:
        if self.clean and isinstance(self.text, Dataset | RandomNumbers):
            raise InputError("clean rows take the place of a teacher's: leave clean at 0 where no teacher writes")


@register_dataclass
@dataclass(frozen=True)
class CorpusChats:
    """A student's source: chats of the corpus on which the base was pre-trained."""

    chats: int = static()
    batch_size: int = static()
