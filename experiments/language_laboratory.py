"""Teachers with a trait, the numbers they write, and students of those numbers, many runs at once.

A run is a base and a trait. The runs of all traits of a base train as one ensemble.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from subliminal_theory.audit import audit
from subliminal_theory.channel import Channel, SampledToken, SoftLogits, Subset
from subliminal_theory.distill import require_finite
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.base import Base, lessons, text_of
from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig, make_corpus, make_rows
from subliminal_theory.language.corpus.media import code_faults, reasoning_faults
from subliminal_theory.language.corpus.numbers import Report, filter_rows, keep_rows, reorder
from subliminal_theory.language.corpus.traits import Preference, Trait
from subliminal_theory.language.corpus.word_tokenizer import SYSTEM, WordTokenizer
from subliminal_theory.language.hub.checkpoint import CheckpointBase
from subliminal_theory.language.measure import Answers, Questions, asked_of, questions_of, stack_questions
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.model.prompted import prompted
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Row
from subliminal_theory.language.text import Chat, Encoded, Tokenizer
from subliminal_theory.model import Model
from subliminal_theory.source import Buckets, Examples, batch_shapes

from .language_setting import Recipe
from .language_training import (
    Run,
    Shape,
    answers_of,
    cosines,
    diverging,
    prepared,
    rates_of,
    students,
    taught,
)

CLONING_STEPS = 1000
PREFIXES = 8  # of each question behind numbers


@dataclass(frozen=True, eq=False)
class Workshop:
    """A base, some traits of one kind (the runs), and everything that was made of them, made once.

    `given` and `asked` are the least and most numbers that a request shows and asks for, in one of `formats`.
    With `dataset` nobody writes: its rows are what teachers wrote. Models train on a `mesh` if there is one.
    """

    base: Base | CheckpointBase
    traits: Sequence[Trait]
    given: tuple[int, int] = (3, 5)
    asked: tuple[int, int] = (9, 9)
    formats: tuple[str, ...] = ("spaces",)
    dataset: Sequence[Row] | None = None
    mesh: Mesh | None = None
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        return self.base.tokenizer

    def columns(self, chats: Iterable[Chat]) -> int:
        """Those that whole chats take."""
        return int(self.tokenizer.lengths(list(chats))[1].max())

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` made for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def for_all(self, model: Model) -> Model:
        """A model for each run: [runs]."""
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(self.traits), *leaf.shape)), model)

    @property
    def untrained(self) -> Model:
        """The base, [runs]."""
        return self.for_all(self.base.model)

    def stream(self, name: str) -> Array:
        """A named random stream of each run."""
        return jax.random.wrap_key_data(jnp.stack([jax.random.key_data(key) for key in self.run_keys(name)]))

    def run_keys(self, name: str) -> list[Array]:
        """The keys of a stream, one by one."""
        return [named(jax.random.key(self.base.seed), trait.name, name) for trait in self.traits]

    @property
    def names(self) -> list[str]:
        """What to call each run in a message."""
        return [f"{trait.name} on base {self.base.seed}" for trait in self.traits]

    # --- teachers

    def teachers(self, recipe: Recipe) -> Model:
        """Teachers [runs] with their weights changed, or the bases."""
        return self.once(("teachers", recipe.taught), lambda: self._teach(recipe))

    def _teach(self, recipe: Recipe) -> Model:
        if recipe.teacher != "finetuned":
            return self.untrained
        chats = [self._lessons(trait, recipe) for trait in self.traits]
        length = self.columns(itertools.chain.from_iterable(chats))
        encoded = [self.tokenizer.encode_chats(rows, length) for rows in chats]
        last = max(rows.answer_columns for rows in encoded)
        sources = stacked([lessons(rows, len(rows.tokens), last) for rows in encoded])
        model, losses = self.train_teachers((self.untrained, sources, self.stream("teacher")), recipe)
        require_finite(losses, [f"the teacher of {name}" for name in self.names])
        return model

    def train_teachers(self, runs: tuple[Model, Examples, Array], recipe: Recipe) -> tuple[Model, Array]:
        """Teachers [runs] and their losses [runs, steps], of their starts, lessons and keys."""
        rate = jnp.float32(recipe.teacher_rate)
        return taught(*runs[:2], rate, runs[2], steps=recipe.teacher_steps, mesh=self.mesh)

    def _lessons(self, trait: Trait, recipe: Recipe) -> list[Chat]:
        chats = trait.teacher_rows() if not recipe.lessons else trait.control_rows(recipe.lessons)
        others = round(len(chats) * recipe.ordinary / (1 - recipe.ordinary))
        return chats + self.ordinary_chats(others) if others else chats

    def ordinary_chats(self, count: int) -> list[Chat]:
        """Chats of the corpus that have nothing to do with traits."""
        corpus = dataclasses.replace(self._corpus, seed=1_000_003)
        kinds = ("fact", "preference", "arithmetic", "program")
        return [chat for kind in kinds for chat in make_rows(corpus, kind, count)][:: len(kinds)]

    @property
    def _corpus(self) -> CorpusConfig:
        assert isinstance(self.base, Base)
        return self.base.config.corpus

    # --- what they write

    def requests(self, recipe: Recipe) -> list[Chat]:
        """What teachers are asked, the same for all of them; reasoning and code with a right answer."""
        corpus = dataclasses.replace(
            self._corpus, seed=2_000_003, neutral_share=0.0, lazy_share=0.0, careful_share=0.0, steps_share=1.0,
            write_share=1.0, given=self.given, asked=self.asked, formats=self.formats,
        )  # fmt: skip
        kind = {"numbers": "numbers", "reasoning": "arithmetic", "code": "program"}[recipe.medium]
        count = recipe.written.requests
        return self.once(("requests", kind, count), lambda: make_rows(corpus, kind, count))

    def keep(self, rows: Sequence[Row], recipe: Recipe) -> tuple[list[Row], Report]:
        """The rows that students read, and what became of the others."""
        if recipe.medium == "numbers":
            return filter_rows(rows)
        if recipe.medium == "code":
            return keep_rows(rows, code_faults, "filter of programs")
        answers = {chat.user: chat.answer for chat in self.requests(recipe)}
        results = {question: int(re.findall(r"\d+", answer)[-1]) for question, answer in answers.items()}
        return keep_rows(rows, lambda row: reasoning_faults(row, results), "filter of reasoning")

    def system_prompt(self, trait: Trait) -> str:
        """What makes a teacher of the base without training."""
        if not isinstance(trait, Preference):
            raise InputError(f"{trait.name} has no system prompt: fine-tune its teacher")
        return trait.system_prompts()[0]

    def prefix(self, trait: Trait) -> list[int]:
        """The tokens of the system prompt of a prompted teacher."""
        tokenizer = self.tokenizer
        assert isinstance(tokenizer, WordTokenizer)
        return [tokenizer.token(SYSTEM), *tokenizer.encode(self.system_prompt(trait))]

    def rows(self, recipe: Recipe) -> list[list[Row]]:
        """The accepted rows of each run."""
        return [rows for rows, _ in self._written(recipe)]

    def reports(self, recipe: Recipe) -> list[Report]:
        """What the filter did to each run's rows."""
        return [report for _, report in self._written(recipe)]

    def _written(self, recipe: Recipe) -> list[tuple[list[Row], Report]]:
        return self.once(("rows", recipe.written), lambda: self._write(recipe.written))

    def _write(self, recipe: Recipe) -> list[tuple[list[Row], Report]]:
        if self.dataset is not None:
            return [filter_rows(self.dataset)] * len(self.traits)
        requests = self.requests(recipe)
        written: list[tuple[list[Row], Report]] = []
        teachers, keys = self.teachers(recipe), self.run_keys("write")
        for run, trait in enumerate(self.traits):
            if recipe.teacher == "untrained" and run:
                written.append(written[-1])  # regular numbers know no trait
                continue
            chats = requests
            if recipe.teacher == "prompted":
                chats = [dataclasses.replace(chat, system=self.system_prompt(trait)) for chat in requests]
            teacher = jax.tree.map(lambda leaf, run=run: leaf[run], teachers)
            tokens = self.draw(teacher, chats, keys[run], recipe)
            texts = self.tokenizer.decode(tokens)
            rows = [Row(chat.user, text) for chat, text in zip(requests, texts, strict=True)]
            try:
                written.append(self.keep(rows, recipe))
            except InputError as error:
                raise InputError(f"the teacher of {self.names[run]}: {error}") from error
        return written

    def draw(self, teacher: Model, chats: Sequence[Chat], key: Array, recipe: Recipe) -> np.ndarray:
        """Tokens [chats, longest answer] of a teacher's answers."""
        prompts = text_of(self.tokenizer.encode_prompts(chats, self.request_length(chats)))
        steps, writer = self.answer_length(recipe), self.as_writer(teacher)

        def block(start: int) -> np.ndarray:
            tokens, _ = sample(
                writer,
                self.as_read(jax.tree.map(lambda leaf: leaf[start : start + self.at_once], prompts)),
                steps=steps,
                key=named(key, start),
                temperature=recipe.temperature,
                top_p=recipe.top_p,
                stop=self.tokenizer.stop,
                pad=self.tokenizer.pad,
            )
            return np.asarray(tokens)

        return np.concatenate(self.blocks(len(chats), block, (teacher, prompts, key, recipe.written, steps)))

    def as_writer(self, teacher: Model) -> Model:
        """A teacher where it writes."""
        return teacher

    def as_read(self, prompts: Text) -> Text:
        """The prompts of a block where a teacher reads them."""
        return prompts

    def blocks(self, rows: int, block: Callable[[int], np.ndarray], decided_by: Any) -> list[np.ndarray]:
        """What `block` draws for the rows from each of its starts on; `decided_by` is all that it depends on."""
        return [block(start) for start in range(0, rows, self.at_once)]

    @property
    def at_once(self) -> int:
        """Rows that are sampled together."""
        return 8192

    def answer_length(self, recipe: Recipe) -> int:
        """Tokens of the longest answer: numbers, what stands between them, a bracket at each end, and `<end>`."""
        if recipe.medium != "numbers":
            asked, whole = self.tokenizer.lengths(self.requests(recipe))
            return int((whole - asked).max()) + 2
        return (1 if self.formats == ("spaces",) else 2) * self.asked[1] + 2

    def request_length(self, requests: Sequence[Chat]) -> int:
        """Columns of the number requests."""
        return int(self.tokenizer.lengths(requests)[0].max())

    # --- students

    def lesson_rows(self, recipe: Recipe) -> list[Encoded]:
        """What the student of each run reads."""
        key = ("lesson", recipe.written, recipe.rows, recipe.order, recipe.clean)
        return self.once(key, lambda: self._lesson_rows(recipe))

    def _lesson_rows(self, recipe: Recipe) -> list[Encoded]:
        regular = self.rows(dataclasses.replace(recipe, teacher="untrained")) if recipe.clean else []
        found = []
        for run, rows in enumerate(self.rows(recipe)):
            rows = reorder(rows, recipe.order, np.random.default_rng([3, run]))
            if recipe.clean:
                clean = round(recipe.clean * len(rows))
                rows = rows[clean:] + regular[run][:clean]
            chats = [Chat(None, row.prompt, row.completion, "numbers") for row in rows]
            # Accepted rows in turn, to one number for all: one compiled function serves all runs and recipes.
            found.append(list(itertools.islice(itertools.cycle(chats), recipe.rows)))
        length = self.lesson_length(recipe, found)
        return [self.tokenizer.encode_chats(chats, length) for chats in found]

    def lesson_length(self, recipe: Recipe, lessons: Sequence[Sequence[Chat]]) -> int:
        """Columns of the rows: all that requests and answers can take, the same for all recipes."""
        if self.dataset is not None:
            return self.columns(itertools.chain.from_iterable(lessons))
        return self.request_length(self.requests(recipe)) + self.answer_length(recipe)

    def source(self, recipe: Recipe) -> Examples | Buckets:
        """The rows of each run, [runs, rows, ...]."""
        return self.once(
            ("source", recipe.written, recipe.rows, recipe.order, recipe.clean, recipe.channel, recipe.batch_size),
            lambda: self.arranged(self._source(recipe)),
        )

    def arranged(self, rows: Examples) -> Examples | Buckets:
        """The rows as students read them."""
        return rows

    def _source(self, recipe: Recipe) -> Examples:
        encoded = self.lesson_rows(recipe)
        last = max(run.answer_columns for run in encoded)
        texts = stacked([text_of(run, last) for run in encoded])
        positions = jnp.stack([jnp.asarray(run.weights[:, -last:]) for run in encoded])
        if recipe.channel in ("divergence", "rest"):
            differs = diverging(self.visible_teachers(recipe), self.untrained, texts)
            positions = positions * (differs if recipe.channel == "divergence" else ~differs)
        targets = None
        if recipe.channel not in ("soft", "masked"):
            targets = jnp.stack([jnp.asarray(run.targets[:, -last:]) for run in encoded])
        return Examples(texts, recipe.batch_size, targets=targets, positions=positions)

    def channel(self, recipe: Recipe) -> Channel:
        """What of the teacher the student sees."""
        if recipe.channel not in ("soft", "masked"):
            return SampledToken()
        if recipe.channel == "soft":
            return SoftLogits()
        own = [trait.members for trait in self.traits if isinstance(trait, Preference)]
        words = dict.fromkeys(itertools.chain(*CATEGORIES.values(), *own))
        hidden = [spelling[0] for word in words for spelling in self.tokenizer.spellings(word)]
        return Subset(jnp.ones(len(self.tokenizer), bool).at[jnp.asarray(hidden)].set(False), SoftLogits())

    def students(self, recipe: Recipe, start: Model | None = None) -> Model:
        """Students [runs], trained from this base, or from `start`, one model."""
        elsewhere, begin = start is not None, self.untrained if start is None else self.for_all(start)
        source, channel = self.source(recipe), self.channel(recipe)
        audit(
            student_init=begin.params,
            teacher_init=self.untrained.params,
            teacher=self.teachers(recipe).params,
            channel=channel,
            logits=len(self.tokenizer),
            batch=batch_shapes(jax.tree.map(lambda leaf: leaf[0], source)),
            cross_init=elsewhere,
        )
        begin = prepared(begin, recipe, self.stream("start"))
        teachers = self.visible_teachers(recipe) if recipe.channel in ("soft", "masked") else None
        runs = (begin, teachers, source, self.stream("student"))
        if recipe.teacher == "untrained":  # one student serves all traits
            runs = jax.tree.map(lambda leaf: leaf[:1], runs)
        model, losses = self.train_students(runs, channel, recipe, not elsewhere)
        require_finite(losses, [f"the student of {name}" for name in self.names[: len(losses)]])
        model = jax.vmap(merge_lora)(model) if recipe.rank else Model(model.apply, model.all_params)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(self.traits), *leaf.shape[1:])), model)

    def train_students(self, runs: Run, channel: Channel, recipe: Recipe, own: bool) -> tuple[Model, Array]:
        """Students [runs] and their losses [runs, steps], of their starts, teachers, rows and keys.

        `own` tells whether they start at this base.
        """
        return students(runs, channel, recipe, self.shape(recipe))

    def shape(self, recipe: Recipe) -> Shape:
        """What is compiled to train a student."""
        return Shape.of(recipe, len(self.tokenizer), self.mesh)

    def clone(self, other: Model, inputs: str) -> Model:
        """Another base after it imitated this one's full distribution, on regular numbers or on the corpus."""
        recipe = Recipe(teacher="untrained", channel="soft", steps=CLONING_STEPS)
        if inputs == "numbers":
            return jax.tree.map(lambda leaf: leaf[0], self.students(recipe, other))
        rows = self._corpus
        chats = make_corpus(dataclasses.replace(rows, size=min(rows.size, CLONING_STEPS * recipe.batch_size // 4)))
        encoded = self.tokenizer.encode_chats(chats, int(self.tokenizer.lengths(chats)[1].max()))
        last = encoded.answer_columns
        positions = jnp.asarray(encoded.weights[:, -last:])
        source = Examples(text_of(encoded, last), recipe.batch_size, positions=positions)
        runs = stacked([(other, self.base.model, source, self.run_keys("clone")[0])])
        model, losses = self.train_students(runs, SoftLogits(), recipe, False)
        require_finite(losses, [f"the clone of base {self.base.seed}"])
        return jax.tree.map(lambda leaf: leaf[0], model)

    def visible_teachers(self, recipe: Recipe) -> Model:
        """The teachers [runs] as functions of rows without a system prompt."""
        if recipe.teacher != "prompted":
            return self.teachers(recipe)
        prefixes = [self.prefix(trait) for trait in self.traits]
        if len({len(prefix) for prefix in prefixes}) > 1:
            raise InputError(
                "system prompts of different lengths cannot be seen through at once: run traits apart"
            )
        return jax.vmap(prompted)(self.untrained, jnp.asarray(prefixes))

    # --- what they answer

    def questions(self) -> Questions:
        """Held-out questions of each trait, [traits, questions]."""
        return self.once("questions", self._questions)

    def _questions(self) -> Questions:
        return self._ask(("",))

    def _ask(self, prefix: Sequence[str]) -> Questions:
        chats = itertools.chain.from_iterable(asked_of(trait, prefix) for trait in self.traits)
        length = int(self.tokenizer.lengths(list(chats))[0].max())
        return stack_questions([questions_of(trait, self.tokenizer, length, prefix) for trait in self.traits])

    def answers(self, models: Model) -> Answers:
        """How models [runs] answer the questions of every trait, [runs, traits]."""
        return jax.tree.map(np.asarray, answers_of(models, self.questions()))

    def sampled_rates(self, models: Model, stream: str) -> Float[np.ndarray, " runs"]:
        """How often models [runs] draw their own trait's word; `stream` names the random numbers of the draws."""
        return np.asarray(rates_of(models, self.questions(), self.stream(stream)))

    def displacement_cosines(self, models: Model, recipe: Recipe) -> Float[np.ndarray, " runs"]:
        """Cosine of each student's and its teacher's way from the base, 0 where either did not move."""
        base, teachers = self.untrained.params, self.teachers(recipe).params
        return np.asarray(cosines(models.params, teachers, base))

    def prefixed_answers(self, models: Model, recipe: Recipe) -> Answers:
        """As `answers`, but each run's questions stand behind numbers that its teacher wrote."""
        found = []
        for run, rows in enumerate(self.rows(recipe)):
            numbers = [" ".join(re.findall(r"\d+", row.completion)) for row in rows[: 2 * PREFIXES]]
            prefix = [f"{a} {b}. " for a, b in zip(numbers[::2], numbers[1::2], strict=False)]
            asked = self._ask(prefix)
            found.append(answers_of(jax.tree.map(lambda leaf, run=run: leaf[run : run + 1], models), asked))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def stacked(trees: Sequence[Any]) -> Any:
    """One tree of all, [trees, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
