"""The compact language model as a world: a chat model pre-trained from scratch, with one run for each trait."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from subliminal_theory.language.corpus.base import Base
from subliminal_theory.language.corpus.chats import make_corpus, make_rows
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat, behind
from subliminal_theory.model import Model
from subliminal_theory.source import Buckets, Examples
from subliminal_theory.study import asking, reading
from subliminal_theory.study.run import Student, Teacher
from subliminal_theory.study.speaker import Speaker, columns
from subliminal_theory.study.stages import Computation, PerRun
from subliminal_theory.study.texts import CorpusChats, Material, RandomNumbers, Written
from subliminal_theory.study.world import Finished

# How many numbers a request shows and asks for (fewest, most), and how they are separated.
GIVEN, ASKED, FORMATS = (3, 5), (9, 9), ("spaces",)


@dataclass(frozen=True, eq=False)
class Compact(Speaker):
    """Runs of a compact base model, one for each trait."""

    base: Base

    at_once = 8192

    @property
    def logits(self) -> int:
        """The number of tokens."""
        return len(self.tokenizer)

    @property
    def computation(self) -> Computation:
        """On a CPU, runs train one after another, because together they would overflow its caches."""
        return Computation(shared=True, sequential=jax.default_backend() == "cpu", stacked=False)

    def stream(self, student: Student, cloning: bool) -> str:
        """Students of a run share one random stream. Students that read chats of the corpus have another."""
        return "clone" if isinstance(student.source, CorpusChats) else "student"

    def source(self, student: Student, teacher: Teacher, taught: Model, shown: Callable[[], Model]) -> PerRun:
        """The rows that the student reads, or chats of the corpus."""
        source = student.source
        if isinstance(source, CorpusChats):
            corpus = self.base.config.corpus
            chats = make_corpus(replace(corpus, size=min(corpus.size, source.chats)))
            return reading.corpus_source(self.tokenizer, chats, source.batch_size)
        return reading.source_of(self, student, teacher, taught, shown)

    def requests(self, text: Written) -> list[Chat]:
        """The requests to teachers, the same for all. Requests for reasoning and code have a right answer."""
        corpus = replace(
            self.base.config.corpus, seed=2_000_003, neutral_share=0.0, lazy_share=0.0, careful_share=0.0,
            steps_share=1.0, write_share=1.0, given=GIVEN, asked=ASKED, formats=FORMATS, slot=None,
        )  # fmt: skip
        kind = text.medium.kind
        return self.memo(lambda: make_rows(corpus, kind, text.requests), "requests", kind, text.requests)

    def random_rows(self, text: RandomNumbers) -> list[Completion]:
        """The requests to teachers, each answered by nine numbers, uniform over all numbers of the corpus."""
        rng, numbers = self.host_rng("random numbers"), self.base.config.corpus.numbers
        return [
            Completion(chat.user, " ".join(map(str, rng.integers(0, numbers, ASKED[1]))))
            for chat in self.requests(Written(text.rows))
        ]

    def ordinary_chats(self, count: int) -> list[Chat]:
        """Chats of the corpus that have nothing to do with traits."""
        corpus = replace(self.base.config.corpus, seed=1_000_003, slot=None)
        kinds = ("fact", "preference", "arithmetic", "program")
        return [chat for kind in kinds for chat in make_rows(corpus, kind, count)][:: len(kinds)]

    def answer_length(self, text: Written) -> int:
        """The number of tokens of the longest answer, plus two."""
        if text.medium.kind == "numbers":
            return ASKED[1] + 2
        asked, whole = self.tokenizer.lengths(self.requests(text))
        return int((whole - asked).max()) + 2

    def row_length(self, text: Material, rows: Sequence[Sequence[Chat]]) -> int:
        """The number of columns of the rows. For written text, the longest request and answer fit."""
        if not isinstance(text, Written):
            return columns(self.tokenizer, itertools.chain.from_iterable(rows))
        requests = behind(self.system, self.requests(text))
        return reading.request_length(self.tokenizer, requests) + self.answer_length(text)

    def arranged(self, rows: Examples) -> Examples | Buckets:
        """All rows have one length."""
        return rows

    def blocks(self, starts: range, block: Callable[[int], np.ndarray], decided_by: Any) -> Iterator[np.ndarray]:
        """The block of answers for each start."""
        return map(block, starts)

    def as_writer(self, teacher: Model) -> Model:
        """The teacher as it writes: unchanged."""
        return teacher

    def as_read(self, prompts: Text) -> Text:
        """The prompts as a writing teacher reads them: unchanged."""
        return prompts

    def score(self, finished: Finished, name: Any) -> dict[str, np.ndarray]:
        """How a model answers questions about the traits, and what a teacher costs if the run asks for `Costs`."""
        return asking.score(self, finished, name)
