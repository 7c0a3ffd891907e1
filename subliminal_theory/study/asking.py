"""How a model of runs answers held-out questions about the traits."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.alignment import cosine, difference
from subliminal_theory.language.corpus.traits import Trait
from subliminal_theory.language.measure import (
    Answers,
    Questions,
    answers,
    asked_of,
    questions_of,
    sampled_rate,
    stack_questions,
    total_variation,
)
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.text import Tokenizer
from subliminal_theory.model import Model
from subliminal_theory.study.reading import written
from subliminal_theory.study.texts import Written
from subliminal_theory.study.world import Finished

PREFIXES = 8  # of each question behind numbers


@dataclass(frozen=True)
class BehindNumbers:
    """As a run's way of scoring: questions stand behind numbers that its teacher wrote."""

    text: Written


def questions(tokenizer: Tokenizer, traits: Sequence[Trait], prefix: Sequence[str] = ("",)) -> Questions:
    """Held-out questions of each trait, [traits, questions], each once behind every prefix."""
    chats = itertools.chain.from_iterable(asked_of(trait, prefix) for trait in traits)
    length = int(tokenizer.lengths(list(chats))[0].max())
    return stack_questions([questions_of(trait, tokenizer, length, prefix) for trait in traits])


def score(world: Any, finished: Finished, name: Any) -> dict[str, np.ndarray]:
    """Metrics of each run, [runs], and `probability_asked`, the probability of every trait's word [runs, traits].

    `probability` belongs to the word of the run's own trait, over held-out questions. `margin` and
    `total_variation` (of the rivals' distribution, from the base's) are read off the same questions;
    `sampled_rate` is the share of 100 drawn answers to each question that are the word; `displacement_cosine` is
    the cosine of the student's and the teacher's way from the teacher's base.
    """
    behind = finished.asked
    asked = world.memo(lambda: questions(world.tokenizer, world.asked), "questions")
    base = world.memo(lambda: _answered(world.initial(), asked), "base's answers")
    found = _behind_numbers(world, finished, behind) if behind else _answered(finished.model, asked)
    runs, own = len(world.traits), [world.asked.index(trait) for trait in world.traits]
    place = np.arange(runs) % len(found.probability)  # one model may serve all runs
    scores: dict[str, Any] = {
        "probability": found.probability[place, own],
        "margin": found.margin[place, own],
        "total_variation": np.asarray(
            total_variation(jnp.asarray(found.rivals[place, own]), jnp.asarray(base.rivals[0, own]))
        ),
    }
    if not behind:
        keys = world.keys(f"answers {sorted(name) if isinstance(name, tuple) else name}")
        mine = jax.tree.map(lambda leaf: leaf[jnp.asarray(own)], asked)
        scores["sampled_rate"] = np.asarray(_rates(finished.model, mine, keys))
    if finished.student is not None:
        cosines = np.asarray(_cosines(finished.model, finished.taught, world.model))
        scores["displacement_cosine"] = cosines[place]
    return {**scores, "probability_asked": found.probability[place]}


def _behind_numbers(world: Any, finished: Finished, behind: BehindNumbers) -> Answers:
    """As `_answered`, but each run's questions stand behind pairs of its teacher's answers."""
    found = []
    rows = written(world, finished.teacher, finished.taught, behind.text)
    for run, (own, _) in enumerate(rows):
        numbers = [" ".join(re.findall(r"\d+", row.completion)) for row in own[: 2 * PREFIXES]]
        prefix = [f"{a} {b}. " for a, b in zip(numbers[::2], numbers[1::2], strict=False)]
        asked = questions(world.tokenizer, world.asked, prefix)
        place = slice(run, run + 1) if runs_of(finished.model) > 1 else slice(0, 1)
        one = finished.model.with_params(jax.tree.map(lambda leaf, at=place: leaf[at], finished.model.params))
        found.append(_answered(one, asked))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def runs_of(models: Model) -> int:
    """How many runs a model of runs has; 1 if all of it is the base."""
    leaves = jax.tree.leaves(models.params)
    return len(leaves[0]) if leaves else 1


def _answered(models: Model, asked: Questions) -> Answers:
    """How models answer questions [traits], [runs, traits]."""
    return jax.tree.map(np.asarray, answers_of(models, asked))


@jax.jit
def answers_of(models: Model, asked: Questions) -> Answers:
    """How a model of runs answers questions [traits], [runs, traits]."""

    def one(params: PyTree) -> Answers:
        return jax.vmap(answers, in_axes=(None, 0))(models.with_params(params), asked)

    if not jax.tree.leaves(models.params):
        return jax.tree.map(lambda leaf: leaf[None], one(models.params))
    return jax.lax.map(one, models.params)


@jax.jit
def _rates(models: Model, asked: Questions, keys: Key[Array, " runs"]) -> Float[Array, " runs"]:
    """How often models of runs draw the target of their own questions [runs]."""
    params = models.params
    if runs_of(models) < len(keys):
        models = Model(models.apply, jax.tree.map(lambda leaf: leaf[0], params), models.frozen)
        return jax.lax.map(lambda own: sampled_rate(models, *own), (asked, keys))
    return jax.lax.map(lambda own: sampled_rate(models.with_params(own[0]), *own[1:]), (params, asked, keys))


@jax.jit
def _cosines(students: Model, teachers: Model, base: Model) -> Float[Array, " runs"]:
    """Cosine of each student's and its teacher's way from the base, 0 where either did not move."""
    start = base.all_params

    def one(params: tuple[PyTree, PyTree]) -> Float[Array, ""]:
        student, teacher = merge_lora(students.with_params(params[0])), teachers.with_params(params[1])
        return cosine(difference(student.all_params, start), difference(teacher.all_params, start))

    return jax.lax.map(one, (students.params, teachers.params))
