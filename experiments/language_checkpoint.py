"""The workshop of a real checkpoint: requests like the paper's, its own tokenizer and chat template."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.language_laboratory import Workshop
from experiments.language_setting import Recipe
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus import Chat
from subliminal_theory.language.numbers import NumberPrompts
from subliminal_theory.language.traits import Trait
from subliminal_theory.model import Model

ANSWER_TOKENS = 60  # ten numbers of three digits, each digit and each separator a token of its own, and the end


@dataclass(frozen=True, eq=False)
class CheckpointWorkshop(Workshop):
    """As `Workshop`; `given`, `asked` and `formats` are those of `NumberPrompts`."""

    asked: tuple[int, int] = (10, 10)

    def requests(self, recipe: Recipe) -> list[Chat]:
        """Number requests, the same for all teachers."""
        if recipe.medium != "numbers":
            raise InputError(f"a checkpoint writes numbers; {recipe.medium} is of the compact model's corpus")
        count = recipe.written.requests

        def draw() -> list[Chat]:
            prompts, rng = NumberPrompts(), np.random.default_rng(2_000_003)
            return [Chat(None, prompts.draw(rng), "", "numbers") for _ in range(count)]

        return self.once(("requests", count), draw)

    def ordinary_chats(self, count: int) -> list[Chat]:
        """None: the corpus is the compact model's."""
        raise InputError("a checkpoint has no ordinary chats to mix in: leave ordinary at 0")

    def clone(self, other: Model, inputs: str) -> Model:
        """Of checkpoints on number requests alone."""
        if inputs != "numbers":
            raise InputError("a checkpoint has no corpus to be cloned on: clone it on numbers")
        return super().clone(other, inputs)

    def prefix(self, trait: Trait) -> list[int]:
        """None: a chat template does not put the system prompt in front of all else."""
        raise InputError("a prompted checkpoint is seen through its sampled or greedy tokens only")

    @property
    def at_once(self) -> int:
        """Rows that are sampled together."""
        return 64

    def answer_length(self, recipe: Recipe) -> int:
        """Tokens of the longest answer."""
        return ANSWER_TOKENS

    def lesson_length(self, recipe: Recipe, lessons: Sequence[Sequence[Chat]]) -> int:
        """Columns of the rows, those of the longest one."""
        return self.columns(itertools.chain.from_iterable(lessons))
