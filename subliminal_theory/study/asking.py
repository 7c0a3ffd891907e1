"""How the models of several runs answer held-out questions about the traits."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from subliminal_theory.language.text import Tokenizer, behind
from subliminal_theory.model import Model, together
from subliminal_theory.study.costs import Costs, costs
from subliminal_theory.study.reading import draw, model_of_run, written
from subliminal_theory.study.run import Steered
from subliminal_theory.study.texts import Behind, Written
from subliminal_theory.study.world import Finished

PREFIXES = 8  # pairs of number lists; each question is asked once after each pair


@dataclass(frozen=True)
class BehindNumbers:
    """A way to score a run: the questions come after numbers that the run's teacher wrote."""

    text: Written


def questions(
    tokenizer: Tokenizer,
    traits: Sequence[Trait],
    prefix: Sequence[str] = ("",),
    systems: Sequence[str | None] | None = None,
) -> Questions:
    """The held-out questions of each trait, [traits, questions]. Each question comes once after every prefix.

    `systems` are the system prompts of the traits, by default none.
    """
    own = [*zip(traits, [None] * len(traits) if systems is None else systems, strict=True)]
    chats = itertools.chain.from_iterable(asked_of(trait, prefix, system) for trait, system in own)
    length = int(tokenizer.lengths(list(chats))[0].max())
    return stack_questions([questions_of(trait, tokenizer, length, prefix, system) for trait, system in own])


def score(world: Any, finished: Finished, name: Any) -> dict[str, np.ndarray]:
    """The metrics of `exact`, and `sampled_rate`: of 100 samples per question, the share that are the word.

    `sampled_rate` is left out if the run is scored with `BehindNumbers` or `Behind`.
    """

    def drawn() -> dict[str, np.ndarray]:
        own = _questions(world, world.system).of_traits(_own(world))
        return {"sampled_rate": np.asarray(_rates(finished.model, own, _keys(world, name)))}

    return _scored(world, finished, drawn)


def score_whole(world: Any, finished: Finished, name: Any, samples: int) -> dict[str, np.ndarray]:
    """The metrics of `exact` and, if `samples` is positive, of `spoken`.

    `spoken` is left out if the run is scored with `BehindNumbers` or `Behind`.
    """

    def drawn() -> dict[str, np.ndarray]:
        return spoken(world, finished.model, _keys(world, name), samples) if samples else {}

    return _scored(world, finished, drawn)


def _scored(world: Any, finished: Finished, drawn: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Exact metrics, sampled metrics (of the world's own questions alone), and costs if the run asks for them."""
    scores = exact(world, finished)
    if not isinstance(finished.asked, BehindNumbers | Behind):
        scores |= drawn()
    if isinstance(finished.asked, Costs):
        scores |= costs(world, finished, finished.asked.text)
    return scores


def exact(world: Any, finished: Finished) -> dict[str, np.ndarray]:
    """Metrics of each run, [runs], that need no sampled answers.

    `probability` is the probability of the word of the run's own trait over the held-out questions. `share` and
    `log_odds` compare that word with its rivals, as in `Answers`. `total_variation` is the distance between the
    run's and the base's distribution over the rivals. `displacement_cosine` is the cosine between the student's
    and the teacher's displacement from the base. Metrics that end in `_asked` are for every trait's word [runs,
    traits].
    """
    system = finished.asked.system if isinstance(finished.asked, Behind) else world.system
    asked = _questions(world, system)
    base = world.memo(lambda: _answered(world.initial(), asked), "base's answers", system)
    if isinstance(finished.asked, BehindNumbers):
        found = _behind_numbers(world, finished, finished.asked)
    else:
        found = _answered(finished.model, asked)
    runs, own = len(world.traits), _own(world)
    place = np.arange(runs) % len(found.probability)  # all runs may share one model
    scores: dict[str, Any] = {
        "probability": found.probability[place, own],
        "share": found.share[place, own],
        "log_odds": found.log_odds[place, own],
        "total_variation": np.asarray(
            total_variation(jnp.asarray(found.rivals[place, own]), jnp.asarray(base.rivals[0, own]))
        ),
    }
    if finished.student is not None:
        # The weights of a steered teacher are the base's.
        taught = world.initial() if isinstance(finished.teacher, Steered) else finished.taught
        cosines = np.asarray(_cosines(finished.model, taught, world.model))
        scores["displacement_cosine"] = cosines[place]
    of_all = {f"{name}_asked": getattr(found, name)[place] for name in ("probability", "share", "log_odds")}
    return {**scores, **of_all}


def spoken(world: Any, models: Model, keys: Key[Array, " runs"], samples: int) -> dict[str, np.ndarray]:
    """How models answer the held-out questions about the preference of their own run.

    Each question gets `samples` whole answers at temperature 1. `named_rate` [runs] is the share of answers that
    name the word anywhere, in any form. `answers` [runs] has, for each run, pairs of a question and its first
    answer. If all runs share one model, it answers a question once for all of them.
    """
    shared, texts = runs_of(models) == 1, dict[Any, list[str]]()
    rates, kept = np.zeros(len(world.traits)), np.empty(len(world.traits), object)
    for run, trait in enumerate(world.traits):
        chats = [chat for chat in behind(world.system, trait.evaluation_rows()) for _ in range(samples)]
        asked = tuple(chat.user for chat in chats), 0 if shared else run
        if asked not in texts:
            tokens = draw(world, model_of_run(models, asked[1]), chats, keys[run], Written(len(chats)))
            texts[asked] = world.tokenizer.decode(np.concatenate([*tokens]))
        said = texts[asked]
        rates[run] = np.mean([trait.named_in(text) for text in said])
        kept[run] = [(chat.user, text) for chat, text in zip(chats, said, strict=True)][::samples]
    return {"named_rate": rates, "answers": kept}


def _questions(world: Any, system: str | None) -> Questions:
    """The held-out questions of all the traits in `world.asked`, behind a system prompt, made once."""
    systems = [system] * len(world.asked)
    return world.memo(lambda: questions(world.tokenizer, world.asked, systems=systems), "questions", system)


def _own(world: Any) -> list[int]:
    """The index of each run's own trait in `world.asked`."""
    return [world.asked.index(trait) for trait in world.traits]


def _keys(world: Any, name: Any) -> Key[Array, " runs"]:
    return world.keys(f"answers {sorted(name) if isinstance(name, tuple) else name}")


def _behind_numbers(world: Any, finished: Finished, behind: BehindNumbers) -> Answers:
    """Like `_answered`, but each run's questions come after pairs of its teacher's answers."""
    found = []
    rows = written(world, finished.teacher, finished.taught, behind.text)
    for run, (own, _) in enumerate(rows):
        numbers = [" ".join(re.findall(r"\d+", row.completion)) for row in own[: 2 * PREFIXES]]
        prefix = [f"{a} {b}. " for a, b in zip(numbers[::2], numbers[1::2], strict=False)]
        asked = questions(world.tokenizer, world.asked, prefix, [world.system] * len(world.asked))
        place = slice(run, run + 1) if runs_of(finished.model) > 1 else slice(0, 1)
        one = finished.model.with_params(jax.tree.map(lambda leaf, at=place: leaf[at], finished.model.params))
        found.append(_answered(one, asked))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def runs_of(models: Model) -> int:
    """The number of runs of a model of runs; 1 if it has no trainable parameters."""
    leaves = jax.tree.leaves(models.params)
    return len(leaves[0]) if leaves else 1


def _answered(models: Model, asked: Questions) -> Answers:
    """The answers of models to questions [traits], as NumPy arrays [runs, traits]."""
    return jax.tree.map(np.asarray, answers_of(models, asked))


@jax.jit
def answers_of(models: Model, asked: Questions) -> Answers:
    """The answers of a model of runs to questions [traits], [runs, traits]."""

    def one(params: PyTree) -> Answers:
        return answers(models.with_params(params), asked)

    if not jax.tree.leaves(models.params):
        return jax.tree.map(lambda leaf: leaf[None], one(models.params))
    return jax.lax.map(one, models.params)


@jax.jit
def _rates(models: Model, asked: Questions, keys: Key[Array, " runs"]) -> Float[Array, " runs"]:
    """How often the model of each run samples the target of its own questions [runs]."""
    params = models.params
    own = (asked.prompts, asked.targets, keys)

    def rate(model: Model, given: tuple[Array, Array, Array]) -> Array:
        prompts, targets, key = given
        return sampled_rate(model, replace(asked, prompts=prompts, targets=targets), key)

    if runs_of(models) < len(keys):
        models = Model(models.apply, jax.tree.map(lambda leaf: leaf[0], params), models.frozen)
        return jax.lax.map(lambda given: rate(models, given), own)
    return jax.lax.map(lambda given: rate(models.with_params(given[0]), given[1:]), (params, *own))


@jax.jit
def _cosines(students: Model, teachers: Model, base: Model) -> Float[Array, " runs"]:
    """Cosine between each student's and its teacher's displacement from the base; 0 if either did not move."""
    start = base.all_params

    def one(params: tuple[PyTree, PyTree]) -> Float[Array, ""]:
        student, teacher = merge_lora(students.with_params(params[0])), teachers.with_params(params[1])
        own = together(student.all_params)
        return cosine(difference(own, start), difference(teacher.all_params, start))

    return jax.lax.map(one, (students.params, teachers.params))
