"""The workshop of a real checkpoint: requests like the paper's, its own tokenizer and chat template."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from subliminal_theory.channel import Channel
from subliminal_theory.distill import State, Trained
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.numbers import NumberPrompts
from subliminal_theory.language.corpus.traits import Trait
from subliminal_theory.language.hub.checkpoint import CheckpointBase
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.model.parallel import place, place_runs, replicate, shardings_like, split_rows
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from subliminal_theory.source import Buckets, Examples

from .language_laboratory import Workshop, stacked
from .language_saves import Saves, export
from .language_setting import Recipe
from .language_training import Run, student_on, taught_on

ANSWER_TOKENS = 60  # ten numbers of three digits, each digit and each separator a token of its own, and the end


@dataclass(frozen=True, eq=False)
class CheckpointWorkshop(Workshop):
    """As `Workshop`; `given`, `asked` and `formats` are those of `prompts`.

    With `saves`, runs train one after the other and go on from there. Students read their rows in `buckets` of
    like length. On a `mesh`, where the base must lie, parameters, optimisers and batches are split over its
    devices; a teacher that writes is whole on each of them, and writes a share of the rows there.
    """

    asked: tuple[int, int] = (10, 10)
    prompts: NumberPrompts = field(default_factory=NumberPrompts)
    saves: Saves | None = None
    buckets: int = 1

    def for_all(self, model: Model) -> Model:
        """A model for each run: [runs]."""
        found = super().for_all(model)
        return found if self.mesh is None else place_runs(found, self.mesh)

    def requests(self, recipe: Recipe) -> list[Chat]:
        """Number requests, the same for all teachers."""
        if recipe.medium != "numbers":
            raise InputError(f"a checkpoint writes numbers; {recipe.medium} is of the compact model's corpus")
        count = recipe.written.requests

        def draw() -> list[Chat]:
            rng = np.random.default_rng(2_000_003)
            return [Chat(None, self.prompts.draw(rng), "", "numbers") for _ in range(count)]

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
        return 256

    def as_writer(self, teacher: Model) -> Model:
        """A teacher where it writes."""
        return teacher if self.mesh is None else replicate(teacher, self.mesh)

    def as_read(self, prompts: Text) -> Text:
        """The prompts of a block where a teacher reads them."""
        return prompts if self.mesh is None else split_rows(prompts, self.mesh)

    def arranged(self, rows: Examples) -> Examples | Buckets:
        """By length, in as many parts as there are buckets; all runs have the same shapes."""
        return rows if self.buckets == 1 else by_length(rows, self.buckets)

    def blocks(self, rows: int, block: Callable[[int], np.ndarray], decided_by: Any) -> list[np.ndarray]:
        """As of `Workshop`; from disk where they are there."""
        if self.saves is None:
            return super().blocks(rows, block, decided_by)
        starts = range(0, rows, self.at_once)
        decided_by = (self._kind, decided_by, self.tokenizer.stop, self.tokenizer.pad)
        return self.saves.blocks(f"base {self.base.seed}", starts, block, decided_by)

    def train_teachers(self, runs: tuple[Model, Examples, Array], recipe: Recipe) -> tuple[Model, Array]:
        """As of `Workshop`."""
        if self.saves is None:
            return super().train_teachers(runs, recipe)
        rate, steps = jnp.float32(recipe.teacher_rate), recipe.teacher_steps

        def go_on(run: Any, state: State | None, count: int) -> Trained:
            return taught_on(run, rate, state, steps=steps, mesh=self.mesh, count=count)

        return self._one_by_one("teacher", runs, go_on, steps, recipe.taught)

    def train_students(self, runs: Run, channel: Channel, recipe: Recipe, own: bool) -> tuple[Model, Array]:
        """As of `Workshop`; students that start at this base are written for other programs, too."""
        if self.saves is None:
            return super().train_students(runs, channel, recipe, own)
        rate, shape = jnp.float32(recipe.rate), self.shape(recipe)

        def go_on(run: Any, state: State | None, count: int) -> Trained:
            return student_on(run, channel, rate, state, shape=shape, count=count)

        def finish(folder: Path, model: Model) -> None:
            assert isinstance(self.base, CheckpointBase)
            assert isinstance(self.tokenizer, CheckpointTokenizer)
            if own:
                export(folder, self.base.checkpoint, model, self.tokenizer.fingerprint)

        return self._one_by_one("student", runs, go_on, recipe.steps, (channel, recipe), finish)

    def _one_by_one(
        self,
        role: str,
        runs: Any,
        go_on: Callable[[Any, State | None, int], Trained],
        steps: int,
        decided_by: Any,
        finish: Callable[[Path, Model], None] = lambda folder, model: None,
    ) -> tuple[Model, Array]:
        """Models [runs] and their losses [runs, steps], each trained from where its saves are."""
        assert self.saves is not None
        done = []
        for number in range(len(jax.tree.leaves(runs)[0])):
            run = jax.tree.map(lambda leaf, number=number: leaf[number], runs)
            name, piece = f"the {role} of {self.names[number]}", functools.partial(go_on, run)
            one = self.saves.trained(
                name, run[0], piece, steps, (self._kind, run, decided_by), finish, self._shardings
            )
            done.append((one.model if self.mesh is None else place(one.model, self.mesh), one.losses))
        models, losses = stacked(done)
        return models if self.mesh is None else place_runs(models, self.mesh), losses

    @property
    def _shardings(self) -> Callable[[State], State] | None:
        """Where what was saved goes."""
        mesh = self.mesh
        if mesh is None:
            return None
        everywhere = NamedSharding(mesh, PartitionSpec())

        def found(state: State) -> State:
            like = shardings_like(state, state.params, mesh)
            return jax.tree.map(lambda _, sharding: sharding or everywhere, state, like)

        return found

    @property
    def _kind(self) -> str:
        """What parameters do not tell of the base."""
        assert isinstance(self.base, CheckpointBase)
        return f"{self.base.checkpoint.family.config} {self.base.model.apply.dtype}"  # type: ignore[attr-defined]

    def answer_length(self, recipe: Recipe) -> int:
        """Tokens of the longest answer."""
        return ANSWER_TOKENS

    def lesson_length(self, recipe: Recipe, lessons: Sequence[Sequence[Chat]]) -> int:
        """Columns of the rows, those of the longest one."""
        return self.columns(itertools.chain.from_iterable(lessons))


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
