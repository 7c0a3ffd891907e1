"""A published checkpoint as a world, with requests like the paper's and its own tokenizer and chat template."""

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
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.numbers import NumberPrompts, random_rows
from subliminal_theory.language.hub.checkpoint import CheckpointBase
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from subliminal_theory.parallel import place_runs, replicate, split_rows
from subliminal_theory.source import Buckets, Examples
from subliminal_theory.study import asking, reading
from subliminal_theory.study.run import Student, Teacher
from subliminal_theory.study.speaker import Speaker, columns
from subliminal_theory.study.stages import Computation, Job, PerRun, Result, trained
from subliminal_theory.study.store import Report, Store, export, silent, what_trains
from subliminal_theory.study.texts import Material, RandomNumbers, Reading, Written
from subliminal_theory.study.world import Finished, Memo

TRIES = 16  # at most this many requests for each ordinary chat
ANSWER_TOKENS = 60  # ten three-digit numbers, with one token for each digit and separator, and the end
# With more than MANY tokens in the vocabulary, the logits of a batch would take more memory than the model, so
# they are computed for CHUNK positions at a time.
MANY, CHUNK = 8192, 1024


@dataclass(frozen=True, eq=False)
class Checkpoint(Speaker):
    """Runs of a checkpoint, one for each trait. Only one run is in memory at a time.

    Attributes:
        base: the checkpoint with its tokenizer.
        prompts: the sentences of number requests.
        store: where rows and training are saved; None saves nothing.
        buckets: students read their rows in this many parts of similar length.
        mesh: the devices over which the base, the optimizer state and the batches are split. A teacher that writes
            is whole on each device and answers a share of the requests there.
        samples: this many whole answers to each question about a trait are sampled and searched for its word.
        opened: from a name to the model of a teacher that was trained elsewhere.
        progress: `progress(what, total, unit)` opens a progress report on rows and training.
        memo: results that are kept in memory.
    """

    base: CheckpointBase
    prompts: NumberPrompts = field(default_factory=NumberPrompts)
    store: Store | None = None
    buckets: int = 1
    mesh: Mesh | None = None
    samples: int = 0
    opened: Callable[[str], Model] | None = None
    progress: Report = silent
    memo: Memo = field(default_factory=lambda: Memo(most=1))

    at_once = 256

    def parts(self) -> Iterator["Checkpoint"]:
        """Worlds of one run each, because only one run is in memory at a time."""
        return map(self.at, range(len(self.traits)))

    @property
    def logits(self) -> int:
        """The number of rows of the output matrix, which may exceed the number of tokens."""
        return self.base.checkpoint.family.config.vocabulary

    @property
    def computation(self) -> Computation:
        """One run after another, each on all devices of the mesh."""
        chunk = CHUNK if len(self.tokenizer) > MANY else None
        return Computation(shared=True, sequential=True, stacked=False, chunk=chunk, mesh=self.mesh)

    def stream(self, student: Student, cloning: bool) -> str:
        """All students of a run share one random stream."""
        return "student"

    def train(
        self,
        jobs: Mapping[Any, Job],
        stops: Mapping[Any, Sequence[int]],
        keys: Key[Array, " runs"],
        decided_by: Mapping[Any, Teacher | Student],
    ) -> Iterator[tuple[Any, int, Result]]:
        """Train the jobs, resuming from the store if there is one. Export students of this base to the store."""
        jobs = {name: self._placed(job) for name, job in jobs.items()}
        if self.store is None:
            for name, job in jobs.items():
                with self.progress(what_trains(job, ", ".join(self.names)), job.steps, "steps") as advance:
                    found = list(trained({name: job}, stops, keys, self.computation))
                    jax.block_until_ready([result.losses for _, _, result in found])
                    advance(job.steps)
                while found:  # a model is let go before the next one trains
                    yield found.pop(0)
            return
        kind = (str(self.base.checkpoint.family.config), str(self.model.apply.dtype))  # type: ignore[attr-defined]
        for name, job in jobs.items():
            own = decided_by[name]
            exported = isinstance(own, Student) and not isinstance(own.start, Fresh)
            for stop, result in self.store.trained(
                job, stops[name], keys, self.names, self.computation, (kind, own),
                self._export if exported else _nothing, self.progress,
            ):  # fmt: skip
                yield name, stop, result

    def _export(self, folder: Path, model: Model) -> None:
        export(folder, self.base.checkpoint, model, self.base.tokenizer.fingerprint)

    def _placed(self, job: Job) -> Job:
        return job if self.mesh is None else replace(job, model=place_runs(job.model, self.mesh))

    def prompted(self) -> Model:
        """See `Speaker.prompted`. This works on one device only.

        Raises:
            InputError: the world has a mesh.
        """
        if self.mesh is not None:
            raise InputError("the logits of a prompted teacher are computed on one device: leave --shards out")
        return super().prompted()

    def source(self, student: Student, teacher: Teacher, taught: Model, shown: Callable[[], Model]) -> PerRun:
        """The rows that the student reads.

        Raises:
            InputError: the student's source is not a `Reading`.
        """
        if not isinstance(student.source, Reading):
            raise InputError("a checkpoint has no corpus to be cloned on: clone it on numbers")
        return reading.source_of(self, student, teacher, taught, shown)

    def requests(self, text: Written) -> list[Chat]:
        """Number requests, the same for all teachers.

        Raises:
            InputError: the medium is not numbers.
        """
        if text.medium.kind != "numbers":
            raise InputError(f"a checkpoint writes numbers; {text.medium.name} is of the compact model's corpus")

        def draw() -> list[Chat]:
            rng = np.random.default_rng(2_000_003)
            return [Chat(None, self.prompts.draw(rng), "", "numbers") for _ in range(text.requests)]

        return self.memo(draw, "requests", text.requests)

    def random_rows(self, text: RandomNumbers) -> list[Completion]:
        """Requests with three numbers, each continued by six more. All numbers have three digits."""
        return random_rows(text.rows, self.host_rng("random numbers"))

    def ordinary_chats(self, count: int) -> list[Chat]:
        """Number requests with the base's own answers. Teachers answer other requests for their students.

        Raises:
            InputError: the base answers too few of them with numbers.
        """

        def make() -> list[Chat]:
            text, rng = Written(TRIES * count, unique=count), np.random.default_rng(1_000_003)
            asked = [Chat(None, self.prompts.draw(rng), "", "numbers") for _ in range(text.requests)]
            key = named(jax.random.key(self.base.seed), "ordinary")
            try:
                rows, _ = reading.answered(self, self.model, asked, key, text)
            except InputError as error:
                raise InputError(f"ordinary chats of base {self.base.seed}: {error}") from error
            return [Chat(None, row.prompt, row.completion, "numbers") for row in rows[:count]]

        return self.memo(make, "ordinary", count)

    def answer_length(self, text: Written) -> int:
        """The number of tokens of the longest answer."""
        return ANSWER_TOKENS

    def row_length(self, text: Material, rows: Sequence[Sequence[Chat]]) -> int:
        """The number of columns of the longest row."""
        return columns(self.tokenizer, itertools.chain.from_iterable(rows))

    def arranged(self, rows: Examples) -> Examples | Buckets:
        """Rows sorted by length into `buckets` parts. All runs have the same shapes."""
        return rows if self.buckets == 1 else by_length(rows, self.buckets)

    def blocks(self, starts: range, block: Callable[[int], np.ndarray], decided_by: Any) -> Iterator[np.ndarray]:
        """The block of answers for each start, read from disk if it is stored."""
        name = f"base {self.base.seed}"
        found: Iterator[np.ndarray] = map(block, starts)
        if self.store is not None:
            kind = (str(self.base.checkpoint.family.config), self.tokenizer.stop, self.tokenizer.pad)
            found = self.store.blocks(name, starts, block, (kind, decided_by))
        with self.progress(f"rows of {name}", len(starts), "blocks") as advance:
            for answers in found:
                advance(1)
                yield answers

    def as_writer(self, teacher: Model) -> Model:
        """The teacher as it writes: whole on every device."""
        return teacher if self.mesh is None else replicate(teacher, self.mesh)

    def as_read(self, prompts: Text) -> Text:
        """The prompts as a writing teacher reads them: split over the devices."""
        return prompts if self.mesh is None else split_rows(prompts, self.mesh)

    def score(self, finished: Finished, name: Any) -> dict[str, np.ndarray]:
        """How a model answers questions about the traits, and what a teacher costs if the run asks for `Costs`."""
        return asking.score_whole(self, finished, name, self.samples)


def _nothing(folder: Path, model: Model) -> None:
    pass


def by_length(rows: Examples, parts: int) -> Buckets:
    """Sort rows [runs, rows, ...] by length into parts of nearly equal size, each as wide as its longest row.

    Raises:
        InputError: there are fewer rows than parts.
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
