"""The recipes of the language experiments: how to make a teacher, what it writes, and how a student learns."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax.numpy as jnp

from subliminal_theory.channel import Channel, SampledToken, SoftLogits, Subset
from subliminal_theory.divergence import NAMED, channel_named
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Perturbed, Shared
from subliminal_theory.language.corpus import numbers
from subliminal_theory.language.corpus.media import DIGITS, MEDIA
from subliminal_theory.study import (
    Behind,
    BehindNumbers,
    Checkpoint,
    Compact,
    CorpusChats,
    Costs,
    Dataset,
    Embeddings,
    Everything,
    FineTuned,
    Frozen,
    Lessons,
    LowRank,
    Optimizer,
    Prompted,
    RandomNumbers,
    Reading,
    Run,
    Steered,
    Student,
    Untrained,
    Written,
)
from subliminal_theory.study.run import MATRICES, Teacher, Trains
from subliminal_theory.study.speaker import hidden_words
from subliminal_theory.study.texts import everywhere, where_they_agree, where_they_differ

from ..app.contract import option, validate
from .names import DECAYS, OPTIMIZERS, named_value

World = Compact | Checkpoint


def _all_but_words(world: World) -> Channel:
    hidden = jnp.asarray(hidden_words(world.tokenizer, world.asked))
    return Subset(jnp.ones(world.logits, bool).at[hidden].set(False), SoftLogits())


CHANNELS: dict[str, Callable[[World], Channel]] = {
    "sampled": lambda world: SampledToken(),
    "greedy": lambda world: SampledToken(0.0),
    "soft": lambda world: SoftLogits(),
    "masked": _all_but_words,
    "divergence": lambda world: SampledToken(),
    "rest": lambda world: SampledToken(),
}
WRITES = {**MEDIA, DIGITS.name: DIGITS}
RANDOM = "random"
NUMBERS = ("numbers", DIGITS.name, RANDOM)
UNTIL = "a fine-tuned teacher stops when its right answers have this probability; 0: never"
ORDINARY = "share of ordinary chats, from the corpus or by the checkpoint itself, among a teacher's rows"
ANCHOR = "weight of a token in ordinary chats; tokens of the trait's lessons weigh 1"
LIMIT = 4  # by default, a teacher gets at most this many requests per row that a student learns
REPEAT = "a teacher answers all requests; if too few rows are accepted, students read them repeatedly"
MEDIUM = (
    f"what the teacher writes; {DIGITS.name}: numbers, because it can sample nothing else; {RANDOM}: nothing; the "
    "student then reads random numbers and sees the teacher's logits on them"
)
CHANNEL = f"what the student sees of the teacher: {', '.join([*CHANNELS, *NAMED])}; top_k:5 sets k to 5"
POSITIONS = {"divergence": where_they_differ, "rest": where_they_agree}
ORDERS: dict[str, numbers.Order] = {
    "as written": numbers.as_written,
    "shuffled within rows": numbers.shuffled_within_rows,
    "shuffled across rows": numbers.shuffled_across_rows,
    "other prompts": numbers.other_prompts,
}
TEACHERS = ("finetuned", "prompted", "steered", "untrained")
STEERING_LAYER = "layer, from 1, after which a steered teacher's vector is added; automatic: at 3/4 of the depth"
STEERING_STRENGTH = f"length of that vector, relative to the residual stream; automatic: {Steered.strength:g}"
STARTS = ("own", "other", "cloned on numbers", "cloned on the corpus")
MODELS = ("student", "teacher", "base")
CLIP, CLONING_STEPS = 1.0, 1000


@dataclass(frozen=True)
class Recipe:
    """How a teacher is made, what it writes, and how a student learns from that.

    Raises:
        InputError: a name is unknown, a value is out of range, or two settings contradict each other.
    """

    teacher: str = option(
        "finetuned", "fine-tuned on its trait, prompted or steered to have it, or untrained", choices=TEACHERS
    )
    steering_layer: int | None = option(None, STEERING_LAYER, minimum=1)
    steering_strength: float | None = option(None, STEERING_STRENGTH)
    teacher_steps: int = option(40, "most full-batch updates of Adam", minimum=1)
    teacher_rate: float = option(3e-3, "learning rate of these updates", positive=True)
    teacher_until: float = option(0.0, UNTIL, minimum=0)
    ordinary: float = option(0.0, ORDINARY, minimum=0)
    anchor: float = option(1.0, ANCHOR, positive=True)
    lessons: str = option("", "benign control that the teacher learns instead of a habit")
    medium: str = option("numbers", MEDIUM, choices=(*WRITES, RANDOM))
    requests: int = option(0, f"most requests to the teacher; {LIMIT} times the rows if 0", minimum=0)
    rows: int = option(8192, "distinct accepted answers that a student learns", minimum=1)
    repeat_rows: bool = option(False, REPEAT)
    temperature: float = option(1.0, "sampling temperature", minimum=0)
    top_p: float = option(1.0, "sampling takes the most likely tokens up to this probability", positive=True)
    channel: str = option("sampled", CHANNEL)
    order: str = option("as written", "order of the numbers in the rows", choices=tuple(ORDERS))
    clean: float = option(0.0, "share of rows that the untrained base wrote instead", minimum=0)
    steps: int = option(250, "steps of the student", minimum=1)
    batch_size: int = option(256, "rows per step", minimum=1)
    rate: float = option(2e-3, "highest learning rate of the student", positive=True)
    optimizer: str = option("adam", "optimizer of the student", choices=tuple(OPTIMIZERS))
    warmup: int = option(0, "steps in which its learning rate rises", minimum=0)
    decay: str = option("cosine", "how the learning rate falls to 0", choices=tuple(DECAYS))
    rank: int = option(0, "rank of low-rank factors; 0 trains everything", minimum=0)
    matrices: tuple[str, ...] = MATRICES  # glob patterns of those that get factors
    frozen: tuple[str, ...] = ()  # glob patterns
    embeddings: tuple[str, ...] = ()  # words; only their embeddings train
    behind: Behind | None = None  # the system prompt of its rows, if it is not the world's
    noise: float = option(0.0, "noise on the start, in units of each parameter's root mean square", minimum=0)

    def __post_init__(self) -> None:
        validate(self)
        if self.channel not in CHANNELS:
            named_value("channel", self.channel.partition(":")[0], {**CHANNELS, **NAMED})
            channel_named(self.channel)
        if self.medium == RANDOM and (self.requests or self.clean):
            raise InputError("--medium random: no teacher writes, so leave out --requests (0) and clean rows")
        if self.warmup >= self.steps:
            raise InputError(f"warmup must be below the {self.steps} steps, got {self.warmup}")
        if self.top_p > 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if sum(map(bool, (self.rank, self.frozen, self.embeddings))) > 1:
            raise InputError("low-rank factors freeze all else: give rank, frozen or embeddings, not two of them")
        for name in ("ordinary", "clean", "teacher_until"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")

        if self.teacher_until and self.ordinary and self.anchor >= 1:
            raise InputError(
                f"--teacher-until counts lessons alone: give ordinary chats an --anchor below 1, not {self.anchor}"
            )

    def taught(self) -> Teacher:
        """The teacher."""
        if self.teacher == "steered":
            strength = Steered.strength if self.steering_strength is None else self.steering_strength
            return Steered(self.steering_layer, jnp.float32(strength))
        if self.teacher != "finetuned":
            return Prompted() if self.teacher == "prompted" else Untrained()
        optimizer = Optimizer(jnp.float32(self.teacher_rate), clip=CLIP)
        return FineTuned(
            optimizer, self.teacher_steps, Lessons(self.lessons, self.ordinary, self.anchor), self.teacher_until
        )

    def written(self) -> Written | RandomNumbers:
        """What the teacher writes, or the random numbers that replace it."""
        if self.medium == RANDOM:
            return RandomNumbers(self.rows)
        temperature = 0.0 if self.channel == "greedy" else self.temperature
        medium, top_p = WRITES[self.medium], self.top_p
        if self.repeat_rows:
            return Written(self.requests or self.rows, medium, temperature, top_p)
        return Written(self.requests or LIMIT * self.rows, medium, temperature, top_p, unique=self.rows)

    def student(self, world: World, start: str = "own", other: int = 1, dataset: Dataset | None = None) -> Student:
        """The student. It starts from its teacher's base, from another base, or from a clone on another base.

        Raises:
            InputError: there is noise, but the student does not start from its teacher's base.
        """
        if self.noise and start != "own":
            raise InputError("noise is for a student that starts at its teacher's base: leave noise or start out")
        positions = POSITIONS.get(self.channel, everywhere)
        text = dataset or self.written()
        rule, decay = OPTIMIZERS[self.optimizer], DECAYS[self.decay]
        order, repeat = ORDERS[self.order], self.repeat_rows
        return Student(
            CHANNELS[self.channel](world) if self.channel in CHANNELS else channel_named(self.channel),
            Reading(text, self.rows, self.batch_size, order, self.clean, positions, repeat, self.behind),
            Optimizer(jnp.float32(self.rate), rule, decay, self.warmup, CLIP),
            self.steps,
            Fresh() if start != "own" else Perturbed(self.noise) if self.noise else Shared(),
            other=other,
            trains=self._trains(world),
            cloned=None if start in ("own", "other") else cloning(start.endswith("corpus")),
        )

    def _trains(self, world: World) -> Trains:
        if self.rank:
            return LowRank(self.rank, self.matrices)
        if self.embeddings:
            words = map(world.tokenizer.encode, self.embeddings)
            return Embeddings(tuple(itertools.chain.from_iterable(words)))
        return Frozen(self.frozen) if self.frozen else Everything()


def cloning(on_corpus: bool) -> Student:
    """How a student on another base first imitates this base's full distribution, on the corpus or on numbers."""
    plain = Recipe(teacher="untrained", repeat_rows=True)
    chats = CorpusChats(CLONING_STEPS * plain.batch_size // 4, plain.batch_size)
    source = chats if on_corpus else Reading(plain.written(), plain.rows, plain.batch_size, repeat=True)
    optimizer = Optimizer(jnp.float32(plain.rate), decay=DECAYS[plain.decay], clip=CLIP)
    return Student(SoftLogits(), source, optimizer, CLONING_STEPS)


@dataclass(frozen=True)
class Variant:
    """One way to make a model for each run, and the labels of its result rows.

    Attributes:
        labels: the labels of the rows.
        recipe: the recipe of teacher and student.
        start: where a student starts, one of STARTS.
        model: which model answers, one of MODELS. Only "student" distills.
        matrix: whether to report the words of all traits, as the metric `probability_asked` and its like.
        prefixed: whether questions come after numbers that the teacher wrote.
        other: the seed of another base minus the seed of the teacher's base.
        costs: whether to report a teacher's costs.
        behind: the system prompt behind which questions come, if it is not the world's.
    """

    labels: Mapping[str, Any]
    recipe: Recipe
    start: str = field(default="own", metadata={"choices": STARTS})
    model: str = field(default="student", metadata={"choices": MODELS})
    matrix: bool = False
    prefixed: bool = field(default=False, metadata={"choices": (True, False)})
    other: int = 1
    costs: bool = False
    behind: Behind | None = None

    def run(self, world: World, dataset: Dataset | None = None) -> Run:
        """The run as values.

        Raises:
            InputError: questions should come after the teacher's numbers, but no teacher writes.
        """
        asked: Any = BehindNumbers(self._numbers()) if self.prefixed else self.behind
        if self.costs:
            asked = Costs(self.recipe.written())
        if self.model == "base":
            taught = self.recipe.taught() if self.prefixed else Untrained()
            return Run(taught, None, asked, base=self.prefixed)
        student = self.recipe.student(world, self.start, self.other, dataset) if self.model == "student" else None
        return Run(self.recipe.taught(), student, asked)

    def _numbers(self) -> Written:
        numbers = self.recipe.written()
        if not isinstance(numbers, Written):
            raise InputError("--medium random: no teacher writes numbers to put before questions")
        return numbers


RECIPE_FIELDS = tuple(f.name for f in fields(Recipe))
VARIANT_CHOICES = {f.name: f.metadata["choices"] for f in fields(Variant) if "choices" in f.metadata}
__all__ = ["CHANNELS", "RECIPE_FIELDS", "TEACHERS", "VARIANT_CHOICES", "Recipe", "Variant", "World"]
