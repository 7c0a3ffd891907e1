"""A published checkpoint as a world: requests like the paper's, its own tokenizer and chat template."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh
from subliminal_theory.language.corpus.base import token_loss
from subliminal_theory.language.corpus.numbers import NumberPrompts
from subliminal_theory.language.corpus.traits import Trait
from subliminal_theory.language.hub.checkpoint import CheckpointBase
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import Chat, Tokenizer
from subliminal_theory.model import Model
from subliminal_theory.parallel import place_runs, replicate, split_rows
from subliminal_theory.source import Buckets, Examples
from subliminal_theory.study import asking, reading
from subliminal_theory.study.compact import trait_keys, trait_words
from subliminal_theory.study.reading import Dataset, Reading, Written
from subliminal_theory.study.run import FineTuned, Student, Teacher
from subliminal_theory.study.stages import Computation, Job, PerRun, Result, trained
from subliminal_theory.study.starts import started
from subliminal_theory.study.store import Store, export
from subliminal_theory.study.world import Finished, Memo

ANSWER_TOKENS = 60  # ten numbers of three digits, each digit and each separator a token of its own, and the end
# Logits of a whole batch over a larger vocabulary would take more memory than the model.
MANY, CHUNK = 8192, 1024


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Runs of a checkpoint, one a trait, in memory one after the other.

    Attributes:
        base: the checkpoint; its seed names the random streams.
        traits: of the runs.
        other: gives the model of another checkpoint with the same tokenizer.
        asked: the traits whose words students are asked for; those of the runs if empty.
        prompts: the sentences of number requests.
        store: where rows and training are saved, if anywhere.
        buckets: parts of rows of like length that students read apart.
        mesh: the devices that share the base, optimizers and batches; a teacher that writes is whole on each of
            them and answers a share of the requests there.
    """

    base: CheckpointBase
    traits: Sequence[Trait]
    other: Callable[[int], Model]
    asked: Sequence[Trait] = ()
    first_run: int = 0
    prompts: NumberPrompts = field(default_factory=NumberPrompts)
    store: Store | None = None
    buckets: int = 1
    mesh: Mesh | None = None
    memo: Memo = field(default_factory=lambda: Memo(most=1))

    at_once = 256
    trait_loss = staticmethod(token_loss)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", self.asked or self.traits)

    def at(self, run: int) -> "Checkpoint":
        """One of the runs."""
        return replace(self, traits=[self.traits[run]], first_run=self.first_run + run)

    def parts(self) -> Iterator["Checkpoint"]:
        """The runs that are in memory at once: one."""
        return map(self.at, range(len(self.traits)))

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
        """The checkpoint's model."""
        return self.base.model

    @property
    def logits(self) -> int:
        """One for each row of the output matrix, perhaps more than there are tokens."""
        return self.base.checkpoint.family.config.vocabulary

    @property
    def computation(self) -> Computation:
        """One run after the other, each on all devices of the mesh."""
        chunk = CHUNK if len(self.tokenizer) > MANY else None
        return Computation(shared=True, sequential=True, stacked=False, chunk=chunk, mesh=self.mesh)

    def keys(self, stream: str) -> Key[Array, " runs"]:
        """A named random stream of each run."""
        return trait_keys(self.base.seed, self.traits, stream)

    def stream(self, student: Student, cloning: bool) -> str:
        """Students of one run share their stream."""
        return "student"

    def initial(self) -> Model:
        """The base, once for all runs."""
        return self.memo(lambda: self.model.freeze("*"), "initial")

    def start(self, student: Student, matched: Model | None = None) -> Model:
        """Where students start: the base, or another one, with what trains of it for each run."""
        base = matched or (self.other(student.other) if isinstance(student.start, Fresh) else self.model)
        return started(base, student, self.keys("start"))

    def train(
        self,
        jobs: Mapping[Any, Job],
        stops: Mapping[Any, Sequence[int]],
        keys: Key[Array, " runs"],
        decided_by: Any,
    ) -> Iterator[tuple[Any, int, Result]]:
        """Training, from the store where there is one; students that start at this base are exported there."""
        jobs = {name: self._placed(job) for name, job in jobs.items()}
        if self.store is None:
            yield from trained(jobs, stops, keys, self.computation)
            return
        students = decided_by[1] if isinstance(decided_by, tuple) else {}
        kind = (str(self.base.checkpoint.family.config), str(self.model.apply.dtype))  # type: ignore[attr-defined]
        for name, job in jobs.items():
            own = students.get(name)
            finish = _nothing if own is None or isinstance(own.start, Fresh) else self._export
            decided = (kind, decided_by if own is None else own)
            for stop, result in self.store.trained(
                job, stops[name], keys, self.names, self.computation, decided, finish
            ):
                yield name, stop, result

    def _export(self, folder: Path, model: Model) -> None:
        export(folder, self.base.checkpoint, model, self.base.tokenizer.fingerprint)

    def _placed(self, job: Job) -> Job:
        return job if self.mesh is None else replace(job, model=place_runs(job.model, self.mesh))

    def lessons(self, teacher: FineTuned) -> PerRun:
        """Questions about each trait, answered as the trait asks."""
        return reading.teacher_lessons(self, teacher)

    def source(self, student: Student, teacher: Teacher, taught: Model, shown: Callable[[], Model]) -> PerRun:
        """What the teacher wrote.

        Raises:
            InputError: the source is not text that was written for this.
        """
        if not isinstance(student.source, Reading):
            raise InputError("a checkpoint has no corpus to be cloned on: clone it on numbers")
        return reading.source_of(self, student, teacher, taught, shown)

    def requests(self, text: Written) -> list[Chat]:
        """Number requests, the same for all teachers.

        Raises:
            InputError: something else than numbers is asked for.
        """
        if text.medium.kind != "numbers":
            raise InputError(f"a checkpoint writes numbers; {text.medium.name} is of the compact model's corpus")

        def draw() -> list[Chat]:
            rng = np.random.default_rng(2_000_003)
            return [Chat(None, self.prompts.draw(rng), "", "numbers") for _ in range(text.requests)]

        return self.memo(draw, "requests", text.requests)

    def ordinary_chats(self, count: int) -> list[Chat]:
        """None: the corpus belongs to the compact model.

        Raises:
            InputError: always.
        """
        raise InputError("a checkpoint has no ordinary chats to mix in: leave ordinary at 0")

    def answer_length(self, text: Written) -> int:
        """Tokens of the longest answer."""
        return ANSWER_TOKENS

    def row_length(self, text: Written | Dataset, rows: Sequence[Sequence[Chat]]) -> int:
        """Columns of the longest row."""
        return reading.columns(self.tokenizer, itertools.chain.from_iterable(rows))

    def arranged(self, rows: Examples) -> Examples | Buckets:
        """Rows by length, in as many parts as there are buckets; all runs have the same shapes."""
        return rows if self.buckets == 1 else by_length(rows, self.buckets)

    def blocks(self, starts: range, block: Callable[[int], np.ndarray], decided_by: Any) -> list[np.ndarray]:
        """The answers from each start on, from disk where they are there."""
        if self.store is None:
            return [block(start) for start in starts]
        kind = (str(self.base.checkpoint.family.config), self.tokenizer.stop, self.tokenizer.pad)
        return self.store.blocks(f"base {self.base.seed}", starts, block, (kind, decided_by))

    def as_writer(self, teacher: Model) -> Model:
        """A teacher where it writes: whole on every device."""
        return teacher if self.mesh is None else replicate(teacher, self.mesh)

    def as_read(self, prompts: Text) -> Text:
        """The prompts where a teacher reads them: a share on every device."""
        return prompts if self.mesh is None else split_rows(prompts, self.mesh)

    def private(self, student: Student) -> Sequence[int]:
        """The traits' words, for a channel that hides them."""
        return trait_words(self, student)

    def score(self, finished: Finished, name: Any) -> dict[str, np.ndarray]:
        """How a model answers questions about the traits."""
        return asking.score(self, finished, name)


def _nothing(folder: Path, model: Model) -> None:
    pass


def by_length(rows: Examples, parts: int) -> Buckets:
    """Rows [runs, rows, ...] from the shortest to the longest in parts of like number, each as wide as it must be.

    Raises:
        InputError: fewer rows than parts.
    """
    count, width = rows.inputs.tokens.shape[1:]
    if count < parts:
        raise InputError(f"--buckets: {count} rows cannot be in {parts} buckets")
    order = jnp.argsort(-rows.inputs.padding, axis=1, stable=True)
    found = []
    for chosen in jnp.array_split(order, parts, axis=1):
        text, targets, positions = jax.tree.map(
            lambda leaf, chosen=chosen: jax.vmap(lambda own, index: own[index])(leaf, chosen),
            (rows.inputs, rows.targets, rows.positions),
        )
        columns = width - int(text.padding.min())
        last = min(text.last, columns)
        text = replace(
            text, tokens=text.tokens[..., -columns:], padding=text.padding - (width - columns), last=last
        )
        targets, positions = jax.tree.map(lambda leaf, last=last: leaf[..., -last:], (targets, positions))
        found.append(replace(rows, inputs=text, targets=targets, positions=positions))
    return Buckets(tuple(found))
