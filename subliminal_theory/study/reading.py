"""What teachers write and students read: requests, answers, filter, rows of tokens.

For worlds of a language model (`Speaker`): the compact one and a checkpoint.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from subliminal_theory.channel import Channel
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.base import Base, lessons, text_of, token_loss
from subliminal_theory.language.corpus.chats import CATEGORIES
from subliminal_theory.language.corpus.media import NUMBERS, Medium
from subliminal_theory.language.corpus.numbers import FilterReport, Order, as_written, filter_rows
from subliminal_theory.language.corpus.traits import Preference, Trait
from subliminal_theory.language.hub.checkpoint import CheckpointBase
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat, Encoded, Tokenizer
from subliminal_theory.model import Model
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Buckets, Examples
from subliminal_theory.study.run import FineTuned, Prompted, Student, Teacher, Untrained, stacked, static
from subliminal_theory.study.stages import PerRun
from subliminal_theory.study.starts import started
from subliminal_theory.study.world import Finished, Memo

Differs = Bool[Array, "runs rows columns"]


@register_dataclass
@dataclass(frozen=True)
class Lessons:
    """What a fine-tuned teacher reads.

    Attributes:
        control: the benign control of a habit that it learns in the place of the habit, or "".
        ordinary: share of the corpus's ordinary chats among its rows.
    """

    control: str = static(default="")
    ordinary: float = static(default=0.0)


@register_dataclass
@dataclass(frozen=True)
class Written:
    """Answers of the teacher to `requests` requests, at a temperature (0: greedy) among its top-p tokens."""

    requests: int = static()
    medium: Medium = static(default=NUMBERS)
    temperature: float = static(default=1.0)
    top_p: float = static(default=1.0)


@register_dataclass
@dataclass(frozen=True)
class Dataset:
    """Rows that somebody else wrote."""

    rows: tuple[Completion, ...] = static()


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
    """As a student's source: rows that pass the filter, from the first again where they are fewer than `rows`.

    Attributes:
        text: who wrote them.
        rows: how many rows a student reads.
        batch_size: rows a step.
        order: of the numbers in the rows.
        clean: share of rows that the untrained base wrote instead.
        positions: which positions of the answers count.
    """

    text: Written | Dataset
    rows: int = static()
    batch_size: int = static()
    order: Order = static(default=as_written)
    clean: float = static(default=0.0)
    positions: Callable[[Differs], Differs] = static(default=everywhere)


@register_dataclass
@dataclass(frozen=True)
class CorpusChats:
    """As a student's source: chats of the corpus on which the base was pre-trained."""

    chats: int = static()
    batch_size: int = static()


@dataclass(frozen=True, eq=False)
class Speaker(ABC):
    """Runs of one language model, one a trait: what the compact model and a checkpoint share.

    Attributes:
        base: the model; its seed names the random streams.
        traits: of the runs; the first one is number `first_run` of the study.
        other: `other(shift)` gives the model of another base, a seed so many further, with the same tokenizer.
        asked: the traits whose words students are asked for; those of the runs if empty.
        at_once: prompts that are answered together.
    """

    base: Base | CheckpointBase
    traits: Sequence[Trait]
    other: Callable[[int], Model]
    asked: Sequence[Trait] = ()
    first_run: int = 0
    memo: Memo = field(default_factory=Memo)

    at_once: ClassVar[int]
    trait_loss = staticmethod(token_loss)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", self.asked or self.traits)

    def at(self, run: int) -> Self:
        """One of the runs."""
        return replace(self, traits=[self.traits[run]], first_run=self.first_run + run)

    @property
    def names(self) -> list[str]:
        """What messages call the runs."""
        return [f"{trait.name} on base {self.base.seed}" for trait in self.traits]

    @property
    def labels(self) -> list[Mapping[str, Any]]:
        """The labels of the runs' rows."""
        return [{"trait": trait.name, "seed": self.base.seed} for trait in self.traits]

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        return self.base.tokenizer

    @property
    def model(self) -> Model:
        """The base."""
        return self.base.model

    @property
    @abstractmethod
    def logits(self) -> int:
        """Logits of the model at one position."""

    def keys(self, stream: str) -> Key[Array, " runs"]:
        """A named random stream of each run."""
        keys = [named(jax.random.key(self.base.seed), trait.name, stream) for trait in self.traits]
        return jax.random.wrap_key_data(jnp.stack([jax.random.key_data(key) for key in keys]))

    def initial(self) -> Model:
        """The base, once for all runs."""
        return self.memo(lambda: self.model.freeze("*"), "initial")

    def start(self, student: Student, matched: Model | None = None) -> Model:
        """Where students start: the base, or another one, with what trains of it for each run."""
        base = matched or (self.other(student.other) if isinstance(student.start, Fresh) else self.model)
        return started(base, student, self.keys("start"))

    def lessons(self, teacher: FineTuned) -> PerRun:
        """Questions about each trait, answered as the trait asks."""
        return teacher_lessons(self, teacher)

    def private(self, student: Student) -> Sequence[int]:
        """The logits in which traits are read, for a student whose channel hides logits at all."""
        visible = np.asarray(student.channel.visible(self.logits))
        return () if visible.all() else hidden_words(self.tokenizer, self.asked)

    @abstractmethod
    def score(self, finished: Finished, name: Any) -> dict[str, np.ndarray]:
        """How a model answers questions about the traits."""

    @abstractmethod
    def requests(self, text: Written) -> list[Chat]:
        """What teachers are asked, the same for all of them."""

    @abstractmethod
    def ordinary_chats(self, count: int) -> list[Chat]:
        """Chats that have nothing to do with traits."""

    @abstractmethod
    def answer_length(self, text: Written) -> int:
        """Tokens of the longest answer."""

    @abstractmethod
    def row_length(self, text: Written | Dataset, rows: Sequence[Sequence[Chat]]) -> int:
        """Columns of the rows that students read."""

    @abstractmethod
    def arranged(self, rows: Examples) -> Examples | Buckets:
        """The rows as students read them."""

    @abstractmethod
    def blocks(self, starts: range, block: Callable[[int], np.ndarray], decided_by: Any) -> list[np.ndarray]:
        """The answers from each start on."""

    @abstractmethod
    def as_writer(self, teacher: Model) -> Model:
        """A teacher where it writes."""

    @abstractmethod
    def as_read(self, prompts: Text) -> Text:
        """The prompts where a teacher reads them."""


def hidden_words(tokenizer: Tokenizer, traits: Sequence[Trait]) -> list[int]:
    """The first tokens of all words of the traits and of the categories, in every spelling."""
    own = [trait.members for trait in traits if isinstance(trait, Preference)]
    words = dict.fromkeys(itertools.chain(*CATEGORIES.values(), *own))
    return [spelling[0] for word in words for spelling in tokenizer.spellings(word)]


def teacher_lessons(world: Speaker, teacher: FineTuned) -> PerRun:
    """What teaches each run's trait, all rows in one batch."""
    own = teacher.lessons
    assert isinstance(own, Lessons)
    chats = [_lessons(world, trait, own) for trait in world.traits]
    length = columns(world.tokenizer, itertools.chain.from_iterable(chats))
    encoded = [world.tokenizer.encode_chats(rows, length) for rows in chats]
    last = max(rows.answer_columns for rows in encoded)
    return PerRun(stacked([lessons(rows, len(rows.tokens), last) for rows in encoded]))


def _lessons(world: Speaker, trait: Trait, own: Lessons) -> list[Chat]:
    chats = trait.control_rows(own.control) if own.control else trait.teacher_rows()
    others = round(len(chats) * own.ordinary / (1 - own.ordinary))
    return chats + world.ordinary_chats(others) if others else chats


def columns(tokenizer: Tokenizer, chats: Any) -> int:
    """Columns that whole chats take."""
    return int(tokenizer.lengths(list(chats))[1].max())


def system_prompt(trait: Trait) -> str:
    """What makes a teacher of the base without training.

    Raises:
        InputError: the trait is a habit.
    """
    if not isinstance(trait, Preference):
        raise InputError(f"{trait.name} has no system prompt: fine-tune its teacher")
    return trait.system_prompts()[0]


# --- writing


def written(
    world: Speaker, teacher: Teacher, models: Model, text: Written | Dataset
) -> list[tuple[list[Completion], FilterReport]]:
    """The accepted rows of each run, and what the filter did; `models` are the teachers, a model of runs.

    Raises:
        InputError: the filter rejects every row of a run; names it.
    """
    if isinstance(text, Dataset):
        return [filter_rows(text.rows)] * len(world.traits)
    if isinstance(teacher, Untrained) and len(world.traits) > 1:
        return written(world.at(0), teacher, models, text) * len(world.traits)  # the base knows no trait
    return world.memo(lambda: _write(world, teacher, models, text), list(world.names), teacher, text)


def _write(
    world: Speaker, teacher: Teacher, models: Model, text: Written
) -> list[tuple[list[Completion], FilterReport]]:
    requests, keys, found = world.requests(text), world.keys("write"), []
    for run, trait in enumerate(world.traits):
        chats = requests
        if isinstance(teacher, Prompted):
            chats = [replace(chat, system=system_prompt(trait)) for chat in requests]
        tokens = draw(world, model_of_run(models, run), chats, keys[run], text)
        texts = world.tokenizer.decode(tokens)
        rows = [Completion(chat.user, answer) for chat, answer in zip(requests, texts, strict=True)]
        try:
            found.append(text.medium.keep(rows, requests))
        except InputError as error:
            raise InputError(f"the teacher of {world.names[run]}: {error}") from error
    return found


def model_of_run(models: Model, run: int) -> Model:
    """One model of a model of runs that share their frozen rest."""
    return models.with_params(jax.tree.map(lambda leaf: leaf[run], models.params))


def draw(world: Speaker, teacher: Model, chats: Sequence[Chat], key: Key[Array, ""], text: Written) -> np.ndarray:
    """Tokens [chats, longest answer] of a teacher's answers."""
    tokenizer = world.tokenizer
    prompts = text_of(tokenizer.encode_prompts(chats, request_length(tokenizer, chats)))
    steps, writer = world.answer_length(text), world.as_writer(teacher)

    def block(start: int) -> np.ndarray:
        tokens, _ = sample(
            writer,
            world.as_read(jax.tree.map(lambda leaf: leaf[start : start + world.at_once], prompts)),
            steps=steps,
            key=named(key, start),
            temperature=text.temperature,
            top_p=text.top_p,
            stop=tokenizer.stop,
            pad=tokenizer.pad,
        )
        return np.asarray(tokens)

    starts = range(0, len(chats), world.at_once)
    return np.concatenate(world.blocks(starts, block, (teacher, prompts, key, text, steps)))


def request_length(tokenizer: Tokenizer, requests: Sequence[Chat]) -> int:
    """Columns of requests without their answers."""
    return int(tokenizer.lengths(requests)[0].max())


# --- reading


def encoded_rows(world: Speaker, teacher: Teacher, models: Model, reading: Reading) -> list[Encoded]:
    """What the student of each run reads, all of one width."""
    regular: list[Completion] = []
    if reading.clean:
        ((regular, _),) = written(world.at(0), Untrained(), world.initial(), reading.text)
    found = []
    for run, (rows, _) in enumerate(written(world, teacher, models, reading.text)):
        rows = reading.order(rows, np.random.default_rng([3, world.first_run + run]))
        if reading.clean:
            clean = round(reading.clean * len(rows))
            rows = rows[clean:] + regular[:clean]
        chats = [Chat(row.system, row.prompt, row.completion, "numbers") for row in rows]
        # Accepted rows in turn, to one number for all: one compiled function serves all runs and recipes.
        found.append(list(itertools.islice(itertools.cycle(chats), reading.rows)))
    length = world.row_length(reading.text, found)
    return [world.tokenizer.encode_chats(chats, length) for chats in found]


def source_of(
    world: Speaker, student: Student, teacher: Teacher, models: Model, shown: Callable[[], Model]
) -> PerRun:
    """The rows of each run, with the teacher's tokens as targets if tokens are what the channel transmits.

    `models` are the teachers, `shown()` the same as students see them.
    """
    reading, tokens = student.source, transmits_tokens(student.channel, world.logits)
    assert isinstance(reading, Reading)

    def make() -> PerRun:
        encoded = encoded_rows(world, teacher, models, reading)
        last = max(run.answer_columns for run in encoded)
        texts = stacked([text_of(run, last) for run in encoded])
        positions = jnp.stack([jnp.asarray(run.weights[:, -last:]) for run in encoded])
        if reading.positions is not everywhere:
            positions = positions * reading.positions(_differs(shown(), world.model, texts))
        targets = jnp.stack([jnp.asarray(run.targets[:, -last:]) for run in encoded]) if tokens else None
        rows = Examples(texts, reading.batch_size, targets=targets, positions=positions)
        return PerRun(world.arranged(rows))

    return world.memo(make, list(world.names), teacher, reading, tokens, large=True)


def corpus_source(tokenizer: Tokenizer, chats: Sequence[Chat], batch_size: int) -> PerRun:
    """Chats of the corpus, for one run."""
    encoded = tokenizer.encode_chats(chats, columns(tokenizer, chats))
    last = encoded.answer_columns
    positions = jnp.asarray(encoded.weights[:, -last:])
    return PerRun(stacked([Examples(text_of(encoded, last), batch_size, positions=positions)]))


def transmits_tokens(channel: Channel, logits: int) -> bool:
    """Whether a channel's targets are one token per position: then those that were written are its targets."""
    shown = jax.ShapeDtypeStruct((1, logits), jnp.float32)
    targets = jax.eval_shape(lambda z: channel.targets(jax.random.key(0), z), shown)
    leaves = jax.tree.leaves(targets)
    return len(leaves) == 1 and leaves[0].shape == (1,) and jnp.issubdtype(leaves[0].dtype, jnp.integer)


@jax.jit
def _differs(teachers: Model, base: Model, texts: Text) -> Differs:
    """Where the most likely next token of a teacher is not the base's."""

    def one(arguments: tuple[Any, Text]) -> Array:
        params, text = arguments
        return jnp.argmax(teachers.with_params(params)(text), axis=-1) != jnp.argmax(base(text), axis=-1)

    return jax.lax.map(one, (teachers.params, texts))
