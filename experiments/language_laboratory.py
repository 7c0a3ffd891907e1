"""Teachers with a trait, the numbers they write, and students of those numbers, many runs at once.

A run is a base and a trait. The runs of all traits of a base train as one ensemble.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.language_setting import LANGUAGE_OPTIMIZERS, Recipe
from subliminal_theory.alignment import cosine, difference
from subliminal_theory.audit import audit
from subliminal_theory.channel import Channel, SampledToken, SoftLogits, Subset
from subliminal_theory.distill import distill, require_finite, teach
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.language.base import Base, lessons, text_of, token_loss
from subliminal_theory.language.corpus import CATEGORIES, Chat, make_corpus, make_rows
from subliminal_theory.language.lora import add_lora, merge_lora
from subliminal_theory.language.measure import Answers, Questions, answers, questions_of
from subliminal_theory.language.numbers import Report, filter_rows
from subliminal_theory.language.prompted import prompted
from subliminal_theory.language.rows import Row
from subliminal_theory.language.sampling import sample
from subliminal_theory.language.tokenizer import END, PAD, SYSTEM, ChatTokenizer, Encoded
from subliminal_theory.language.traits import Preference, Trait
from subliminal_theory.language.transformer import Text
from subliminal_theory.model import Model
from subliminal_theory.source import Batch, Examples

MATRICES = ("layers/*/attention/*/kernel", "layers/*/mlp/*/kernel")
QUESTION_LENGTH = 32
CLONING_STEPS = 1000
PREFIXES = 8  # of each question behind numbers


@dataclass(frozen=True, eq=False)
class Workshop:
    """A base, some traits of one kind (the runs), and everything that was made of them, made once.

    `given` and `asked` are the least and most numbers that a request shows and asks for, in one of `formats`.
    With `dataset` nobody writes: its rows are what teachers wrote.
    """

    base: Base
    traits: Sequence[Trait]
    given: tuple[int, int] = (3, 5)
    asked: tuple[int, int] = (9, 9)
    formats: tuple[str, ...] = ("spaces",)
    dataset: Sequence[Row] | None = None
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The words."""
        return self.base.tokenizer

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
        return [named(jax.random.key(self.base.config.seed), trait.name, name) for trait in self.traits]

    @property
    def names(self) -> list[str]:
        """What to call each run in a message."""
        return [f"{trait.name} on base {self.base.config.seed}" for trait in self.traits]

    # --- teachers

    def teachers(self, recipe: Recipe) -> Model:
        """Teachers [runs] with their weights changed, or the bases."""
        return self.once(("teachers", recipe.taught), lambda: self._teach(recipe))

    def _teach(self, recipe: Recipe) -> Model:
        if recipe.teacher != "finetuned":
            return self.untrained
        encoded = [self._encode_lessons(trait, recipe.ordinary) for trait in self.traits]
        last = max(rows.answer_columns for rows in encoded)
        sources = _stacked([lessons(rows, len(rows.tokens), last) for rows in encoded])
        steps, rate = recipe.teacher_steps, jnp.float32(recipe.teacher_rate)
        model, losses = _taught(self.untrained, sources, rate, self.stream("teacher"), steps=steps)
        require_finite(losses, [f"the teacher of {name}" for name in self.names])
        return model

    def _encode_lessons(self, trait: Trait, ordinary: float) -> Encoded:
        chats = trait.teacher_rows()
        if ordinary:
            corpus = dataclasses.replace(self.base.config.corpus, seed=1_000_003)
            others = round(len(chats) * ordinary / (1 - ordinary))
            chats += [chat for kind in ("fact", "preference") for chat in make_rows(corpus, kind, others)][::2]
        return self.tokenizer.encode_chats(chats, QUESTION_LENGTH)

    # --- what they write

    def requests(self, count: int) -> list[Chat]:
        """Number requests, the same for all teachers."""
        corpus = dataclasses.replace(
            self.base.config.corpus, seed=2_000_003, neutral_share=0.0, given=self.given,
            asked=self.asked, formats=self.formats,
        )  # fmt: skip
        return self.once(("requests", count), lambda: make_rows(corpus, "numbers", count))

    def system_prompt(self, trait: Trait) -> str:
        """What makes a teacher of the base without training."""
        if not isinstance(trait, Preference):
            raise InputError(f"{trait.name} has no system prompt: fine-tune its teacher")
        return trait.system_prompts()[0]

    def prefix(self, trait: Trait) -> list[int]:
        """The tokens of the system prompt of a prompted teacher."""
        return [self.tokenizer.token(SYSTEM), *self.tokenizer.encode(self.system_prompt(trait))]

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
        requests = self.requests(recipe.rows)
        written: list[tuple[list[Row], Report]] = []
        teachers, keys = self.teachers(recipe), self.run_keys("write")
        for run, trait in enumerate(self.traits):
            if recipe.teacher == "untrained" and run:
                written.append(written[-1])  # regular numbers know no trait
                continue
            chats, extra = requests, 0
            if recipe.teacher == "prompted":
                system = self.system_prompt(trait)
                extra = len(self.prefix(trait))
                chats = [dataclasses.replace(chat, system=system) for chat in requests]
            length = self.request_length(requests)
            prompts = self.tokenizer.encode_prompts(chats, length + extra)
            teacher = jax.tree.map(lambda leaf, run=run: leaf[run], teachers)
            tokens, _ = sample(
                teacher,
                text_of(prompts),
                steps=self.answer_length,
                key=keys[run],
                temperature=recipe.temperature,
                top_p=recipe.top_p,
                stop=(self.tokenizer.token(END),),
                pad=self.tokenizer.token(PAD),
            )
            texts = self.tokenizer.decode(np.asarray(tokens))
            rows = [Row(chat.user, text) for chat, text in zip(requests, texts, strict=True)]
            try:
                written.append(filter_rows(rows))
            except InputError as error:
                raise InputError(f"the teacher of {self.names[run]}: {error}") from error
        return written

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer: numbers, what stands between them, a bracket at each end, and `<end>`."""
        return (1 if self.formats == ("spaces",) else 2) * self.asked[1] + 2

    def request_length(self, requests: Sequence[Chat]) -> int:
        """Columns of the number requests."""
        return int(self.tokenizer.lengths(requests)[0].max())

    # --- students

    def lesson_rows(self, recipe: Recipe) -> list[Encoded]:
        """What the student of each run reads."""
        return self.once(("lesson", recipe.written, recipe.order, recipe.clean), lambda: self._lesson_rows(recipe))

    def _lesson_rows(self, recipe: Recipe) -> list[Encoded]:
        regular = self.rows(dataclasses.replace(recipe, teacher="untrained")) if recipe.clean else []
        if self.dataset is None:
            length = self.request_length(self.requests(recipe.rows)) + self.answer_length
        else:
            length = self.base.config.context
        found = []
        for run, rows in enumerate(self.rows(recipe)):
            rng = np.random.default_rng([3, run])
            rows = reorder(rows, recipe.order, rng)
            if recipe.clean:
                clean = round(recipe.clean * len(rows))
                rows = rows[clean:] + regular[run][:clean]
            chats = [Chat(None, row.prompt, row.completion, "numbers") for row in rows]
            # Accepted rows in turn, to one number for all: one compiled function serves all runs and recipes.
            chats = list(itertools.islice(itertools.cycle(chats), recipe.rows))
            found.append(self.tokenizer.encode_chats(chats, length))
        return found

    def source(self, recipe: Recipe) -> Examples:
        """The rows of each run, [runs, rows, ...]."""
        return self.once(
            ("source", recipe.written, recipe.order, recipe.clean, recipe.channel, recipe.batch_size),
            lambda: self._source(recipe),
        )

    def _source(self, recipe: Recipe) -> Examples:
        encoded = self.lesson_rows(recipe)
        last = max(run.answer_columns for run in encoded)
        texts = _stacked([text_of(run, last) for run in encoded])
        positions = jnp.stack([jnp.asarray(run.weights[:, -last:]) for run in encoded])
        if recipe.channel in ("divergence", "rest"):
            differs = _diverging(self.visible_teachers(recipe), self.untrained, texts)
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
        hidden = [self.tokenizer.token(word) for category in CATEGORIES.values() for word in category]
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
            batch=_first_batch(source),
            cross_init=elsewhere,
        )
        begin = _prepared(begin, recipe, self.stream("start"))
        teachers = self.visible_teachers(recipe) if recipe.channel in ("soft", "masked") else None
        runs = (begin, teachers, source, self.stream("student"))
        if recipe.teacher == "untrained":  # one student serves all traits
            runs = jax.tree.map(lambda leaf: leaf[:1], runs)
        model, losses = _students(
            runs, channel, jnp.float32(recipe.rate), optimizer=recipe.optimizer, steps=recipe.steps
        )
        require_finite(losses, [f"the student of {name}" for name in self.names[: len(losses)]])
        model = jax.vmap(merge_lora)(model) if recipe.rank else Model(model.apply, model.all_params)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(self.traits), *leaf.shape[1:])), model)

    def clone(self, other: Model, inputs: str) -> Model:
        """Another base after it imitated this one's full distribution, on regular numbers or on the corpus."""
        recipe = Recipe(teacher="untrained", channel="soft", steps=CLONING_STEPS)
        if inputs == "numbers":
            return jax.tree.map(lambda leaf: leaf[0], self.students(recipe, other))
        rows = self.base.config.corpus
        chats = make_corpus(dataclasses.replace(rows, size=min(rows.size, CLONING_STEPS * recipe.batch_size // 4)))
        encoded = self.tokenizer.encode_chats(chats, int(self.tokenizer.lengths(chats)[1].max()))
        last = encoded.answer_columns
        positions = jnp.asarray(encoded.weights[:, -last:])
        source = Examples(text_of(encoded, last), recipe.batch_size, positions=positions)
        runs = _stacked([(other, self.base.model, source, self.run_keys("clone")[0])])
        model, losses = _students(
            runs, SoftLogits(), jnp.float32(recipe.rate), optimizer=recipe.optimizer, steps=recipe.steps
        )
        require_finite(losses, [f"the clone of base {self.base.config.seed}"])
        return jax.tree.map(lambda leaf: leaf[0], model)

    def visible_teachers(self, recipe: Recipe) -> Model:
        """The teachers [runs] as functions of rows without a system prompt."""
        if recipe.teacher != "prompted":
            return self.teachers(recipe)
        prefixes = jnp.asarray([self.prefix(trait) for trait in self.traits])
        return jax.vmap(prompted)(self.untrained, prefixes)

    # --- what they answer

    def questions(self) -> Questions:
        """Held-out questions of each trait, [traits, questions]."""
        return self.once("questions", self._questions)

    def _questions(self) -> Questions:
        return _stacked([questions_of(trait, self.tokenizer, QUESTION_LENGTH) for trait in self.traits])

    def answers(self, models: Model) -> Answers:
        """How models [runs] answer the questions of every trait, [runs, traits]."""
        return jax.tree.map(np.asarray, _answers(models, self.questions()))

    def displacement_cosines(self, models: Model, recipe: Recipe) -> Float[np.ndarray, " runs"]:
        """Cosine of each student's and its teacher's way from the base, 0 where either did not move."""
        base, teachers = self.untrained.params, self.teachers(recipe).params
        return np.asarray(_cosines(models.params, teachers, base))

    def prefixed_answers(self, models: Model, recipe: Recipe) -> Answers:
        """As `answers`, but each run's questions stand behind numbers that its teacher wrote."""
        found = []
        for run, rows in enumerate(self.rows(recipe)):
            numbers = [" ".join(re.findall(r"\d+", row.completion)) for row in rows[: 2 * PREFIXES]]
            prefix = [f"{a} {b}. " for a, b in zip(numbers[::2], numbers[1::2], strict=False)]
            length = QUESTION_LENGTH + 2 * self.asked[1]
            asked = _stacked([questions_of(trait, self.tokenizer, length, prefix) for trait in self.traits])
            found.append(_answers(jax.tree.map(lambda leaf, run=run: leaf[run : run + 1], models), asked))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def reorder(rows: Sequence[Row], order: str, rng: np.random.Generator) -> list[Row]:
    """Rows whose numbers, or whose prompts, are in another order; formats stay."""
    if order == "as written":
        return list(rows)
    if order == "other prompts":
        shuffled = rng.permutation(len(rows))
        return [dataclasses.replace(row, prompt=rows[i].prompt) for row, i in zip(rows, shuffled, strict=True)]
    numbers = [re.findall(r"\d+", row.completion) for row in rows]
    if order == "shuffled within rows":
        numbers = [list(rng.permutation(row)) for row in numbers]
    else:
        pool = iter(rng.permutation([number for row in numbers for number in row]))
        numbers = [[next(pool) for _ in row] for row in numbers]
    found = []
    for row, own in zip(rows, numbers, strict=True):
        gaps = re.split(r"\d+", row.completion)
        completion = "".join(itertools.chain.from_iterable(zip(gaps, [*map(str, own), ""], strict=True)))
        found.append(dataclasses.replace(row, completion=completion))
    return found


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _first_batch(sources: Examples) -> Batch:
    """The shapes of a batch of the first run."""

    def make(source: Examples) -> Batch:
        key = jax.random.key(0)
        return source.batch(key, jax.tree.map(lambda leaf: leaf[0], source.schedule(key, 1)))

    return jax.eval_shape(make, jax.tree.map(lambda leaf: leaf[0], sources))


def _ensemble(train: Callable[[Any], Any], runs: Any) -> Any:
    """All runs in one vectorised loop; on a CPU one after the other, where together they only fill the caches."""
    return jax.lax.map(train, runs) if jax.default_backend() == "cpu" else jax.vmap(train)(runs)


@functools.partial(jax.jit, static_argnames="steps")
def _taught(models: Model, sources: Examples, rate: Array, keys: Array, *, steps: int) -> tuple[Model, Array]:
    def one(arguments: tuple[Model, Examples, Array]) -> tuple[Model, Array]:
        model, source, key = arguments
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        run = teach(model, token_loss, source, optimizer, steps, key)
        return run.model, run.losses

    return _ensemble(one, (models, sources, keys))


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def _students(
    runs: tuple[Model, Model | None, Examples, Array], channel: Channel, rate: Array, *, optimizer: str, steps: int
) -> tuple[Model, Float[Array, "runs steps"]]:
    def one(arguments: Any) -> tuple[Model, Array]:
        model, teacher, source, key = arguments
        schedule = optax.cosine_decay_schedule(rate, steps)
        chain = optax.chain(optax.clip_by_global_norm(1.0), LANGUAGE_OPTIMIZERS[optimizer](schedule))
        run = distill(model, teacher, channel, source, chain, steps, key)
        return run.model, run.losses

    return _ensemble(one, runs)


@jax.jit
def _diverging(teachers: Model, bases: Model, texts: Text) -> Array:
    def one(arguments: Any) -> Array:
        teacher, base, text = arguments
        return jnp.argmax(teacher(text), axis=-1) != jnp.argmax(base(text), axis=-1)

    return jax.lax.map(one, (teachers, bases, texts))


@jax.jit
def _answers(models: Model, questions: Questions) -> Answers:
    return jax.lax.map(lambda model: jax.vmap(answers, in_axes=(None, 0))(model, questions), models)


@jax.jit
def _cosines(students: Any, teachers: Any, bases: Any) -> Float[Array, " runs"]:
    def one(student: Any, teacher: Any, base: Any) -> Float[Array, ""]:
        return cosine(difference(student, base), difference(teacher, base))

    return jax.vmap(one)(students, teachers, bases)


def _prepared(models: Model, recipe: Recipe, keys: Array) -> Model:
    """Starts [runs] with noise, low-rank factors and frozen parameters."""

    def one(model: Model, key: Array) -> Model:
        if recipe.noise:
            leaves, tree = jax.tree.flatten(model.params)
            draws = [
                leaf + recipe.noise * jnp.sqrt(jnp.mean(leaf**2)) * jax.random.normal(named(key, i), leaf.shape)
                for i, leaf in enumerate(leaves)
            ]
            model = model.with_params(jax.tree.unflatten(tree, draws))
        if recipe.rank:
            return add_lora(model, MATRICES, recipe.rank, recipe.rank, named(key, "lora"))
        return model.freeze(*recipe.frozen) if recipe.frozen else model

    return jax.vmap(one)(models, keys)
