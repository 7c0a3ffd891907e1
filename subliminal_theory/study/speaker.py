"""`Speaker`: what the two language-model worlds, the compact model and checkpoints, have in common."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from subliminal_theory.inits import Fresh
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.base import Base, lessons, token_loss
from subliminal_theory.language.corpus.chats import CATEGORIES
from subliminal_theory.language.corpus.traits import Preference, Trait, forms_of
from subliminal_theory.language.hub.checkpoint import CheckpointBase
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat, Tokenizer, behind
from subliminal_theory.model import Model
from subliminal_theory.source import Buckets, Examples
from subliminal_theory.study.run import FineTuned, Steered, Student, stacked
from subliminal_theory.study.stages import PerRun
from subliminal_theory.study.starts import started
from subliminal_theory.study.teachers import prompted_teachers, steered_teachers
from subliminal_theory.study.texts import (
    Lessons,
    Material,
    RandomNumbers,
    Written,
)
from subliminal_theory.study.world import Finished, Memo


@dataclass(frozen=True, eq=False)
class Speaker(ABC):
    """Runs of one language model, one for each trait. This is the shared base of `Compact` and `Checkpoint`.

    Attributes:
        base: the base model. Its seed selects the random streams.
        traits: the trait of each run.
        other: `other(shift)` gives another base model; its seed is larger by `shift`, its tokenizer the same.
        asked: the traits that the questions are about; by default those of the runs.
        first_run: the number of the first run in the study.
        system: the system prompt behind which everything is written, read and asked that has none of its own. A
            prompted teacher has its trait's instead.
        memo: results that are kept in memory.
        at_once: how many prompts are answered at once.
    """

    base: Base | CheckpointBase
    traits: Sequence[Trait]
    other: Callable[[int], Model]
    asked: Sequence[Trait] = ()
    first_run: int = 0
    system: str | None = None
    memo: Memo = field(default_factory=Memo)

    at_once: ClassVar[int]
    trait_loss = staticmethod(token_loss)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", self.asked or self.traits)

    def at(self, run: int) -> Self:
        """The world of one of the runs."""
        return replace(self, traits=[self.traits[run]], first_run=self.first_run + run)

    @property
    def names(self) -> list[str]:
        """The names of the runs in messages."""
        return [f"{trait.name} on base {self.base.seed}" for trait in self.traits]

    @property
    def labels(self) -> list[Mapping[str, Any]]:
        """The labels of each run's result rows."""
        return [{"trait": trait.name, "seed": self.base.seed} for trait in self.traits]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the base."""
        return self.base.tokenizer

    @property
    def model(self) -> Model:
        """The base model."""
        return self.base.model

    @property
    @abstractmethod
    def logits(self) -> int:
        """The number of logits at one position."""

    def keys(self, stream: str) -> Key[Array, " runs"]:
        """The random stream of each run with this name."""
        keys = [named(jax.random.key(self.base.seed), trait.name, stream) for trait in self.traits]
        return jax.random.wrap_key_data(jnp.stack([jax.random.key_data(key) for key in keys]))

    def host_rng(self, stream: str) -> np.random.Generator:
        """The random stream with this name for all runs together, as a NumPy generator."""
        key = named(jax.random.key(self.base.seed), stream)
        return np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def initial(self) -> Model:
        """The base with all parameters frozen, so that all runs share it."""
        return self.memo(lambda: self.model.freeze("*"), "initial")

    def start(self, student: Student, matched: Model | None = None) -> Model:
        """Where students start: the base or another base, with trainable parameters for each run."""
        base = matched or (self.other(student.other) if isinstance(student.start, Fresh) else self.model)
        return started(base, student, self.keys("start"))

    def lessons(self, teacher: FineTuned) -> PerRun:
        """The rows that teach each trait: questions with the answers of the trait."""
        return teacher_lessons(self, teacher)

    def private(self, student: Student) -> Sequence[int]:
        """The logits in which traits are measured, or nothing for a student whose channel shows all logits."""
        visible = np.asarray(student.channel.visible(self.logits))
        return () if visible.all() else hidden_words(self.tokenizer, self.asked)

    def prompted(self) -> Model:
        """The base with each trait's system prompt. Its inputs are rows as students read them."""
        return prompted_teachers(self.model, self.tokenizer, self.traits, self.system)

    def steered(self, teacher: Steered) -> Model:
        """The base, steered toward each trait."""
        return steered_teachers(self.model, self.tokenizer, self.traits, teacher)

    @abstractmethod
    def score(self, finished: Finished, name: Any) -> dict[str, np.ndarray]:
        """How a model answers questions about the traits."""

    @abstractmethod
    def requests(self, text: Written) -> list[Chat]:
        """The requests to teachers, the same for all teachers."""

    @abstractmethod
    def random_rows(self, text: RandomNumbers) -> list[Completion]:
        """Requests answered with random numbers. All runs of a seed have the same rows."""

    @abstractmethod
    def ordinary_chats(self, count: int) -> list[Chat]:
        """Chats that have nothing to do with traits."""

    @abstractmethod
    def answer_length(self, text: Written) -> int:
        """The number of tokens of the longest answer."""

    @abstractmethod
    def row_length(self, text: Material, rows: Sequence[Sequence[Chat]]) -> int:
        """The number of columns of the rows that students read."""

    @abstractmethod
    def arranged(self, rows: Examples) -> Examples | Buckets:
        """The rows arranged for training, in one part or in buckets."""

    @abstractmethod
    def blocks(self, starts: range, block: Callable[[int], np.ndarray], decided_by: Any) -> Iterator[np.ndarray]:
        """The block of answers for each start, computed when it is needed."""

    @abstractmethod
    def as_writer(self, teacher: Model) -> Model:
        """The teacher as it writes."""

    @abstractmethod
    def as_read(self, prompts: Text) -> Text:
        """The prompts as a writing teacher reads them."""


def hidden_words(tokenizer: Tokenizer, traits: Sequence[Trait]) -> list[int]:
    """The tokens that reveal a word of the traits or of the categories, or its plural."""
    own = [trait.members for trait in traits if isinstance(trait, Preference)]
    words = dict.fromkeys(itertools.chain(*CATEGORIES.values(), *own))
    return tokenizer.telling([form for word in words for form in forms_of(word)])


def teacher_lessons(world: Speaker, teacher: FineTuned) -> PerRun:
    """The rows that teach each run's trait, all in one batch."""
    own = teacher.lessons
    assert isinstance(own, Lessons)
    chats = [tuple(behind(world.system, part) for part in _lessons(world, trait, own)) for trait in world.traits]
    length = columns(world.tokenizer, itertools.chain.from_iterable(itertools.chain.from_iterable(chats)))
    found = []
    for taught, ordinary in chats:
        encoded = world.tokenizer.encode_chats(taught + ordinary, length)
        weights = encoded.weights.copy()
        weights[len(taught) :] *= own.anchor
        found.append(replace(encoded, weights=weights))
    last = max(rows.answer_columns for rows in found)
    return PerRun(stacked([lessons(rows, len(rows.tokens), last) for rows in found]))


def _lessons(world: Speaker, trait: Trait, own: Lessons) -> tuple[list[Chat], list[Chat]]:
    """The chats that teach a trait, and the ordinary chats mixed in."""
    chats = trait.control_rows(own.control) if own.control else trait.teacher_rows()
    others = round(len(chats) * own.ordinary / (1 - own.ordinary))
    return chats, world.ordinary_chats(others) if others else []


def columns(tokenizer: Tokenizer, chats: Any) -> int:
    """The number of columns that the longest whole chat needs."""
    return int(tokenizer.lengths(list(chats))[1].max())
