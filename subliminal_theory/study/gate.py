"""What a base must do before prompted teachers on it can pass anything on, and whether it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.traits import Preference
from subliminal_theory.study.asking import answers_of, questions
from subliminal_theory.study.costs import costs
from subliminal_theory.study.run import Prompted
from subliminal_theory.study.speaker import Speaker
from subliminal_theory.study.teachers import system_prompt
from subliminal_theory.study.texts import Written
from subliminal_theory.study.world import Finished


@dataclass(frozen=True)
class Gate:
    """The least values of `measures`, to be reached by the prompted teacher of every trait.

    Attributes:
        taught_probability: the least probability of its word, on the phrasings that bases and teachers learn.
        kl_per_token: the least KL(teacher || base) per token of its answers, in nats. Below about 0.01, a base has
            not learned what a system prompt does to numbers, whatever it answers to questions.
        accepted: the least share of its answers that pass the filter.

    Raises:
        InputError: a probability or share is above 1, or a value is negative.
    """

    taught_probability: float = 0.9
    kl_per_token: float = 0.1
    accepted: float = 0.75

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            most = np.inf if name == "kl_per_token" else 1
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"Gate: {name} must be from 0 to {most}, got {getattr(self, name)}")

    def faults(self, found: Mapping[str, np.ndarray], traits: Sequence[str]) -> list[str]:
        """What is missing, such as "owl: kl_per_token 0.02 below 0.1"; nothing if the base passes."""
        return [
            f"{trait}: {field.name} {value:.2g} below {getattr(self, field.name)}"
            for field in fields(self)
            for trait, value in zip(traits, found[field.name], strict=True)
            if not value >= getattr(self, field.name)
        ]


def measures(world: Speaker, text: Written) -> dict[str, np.ndarray]:
    """Metrics of each run's prompted teacher, [runs]: those of `costs`, and probabilities of its word.

    `probability` is on the held-out questions, `taught_probability` on the lessons; both behind the teacher's
    system prompt, exact.

    Raises:
        InputError: a trait is a habit, or as for `written`.
    """
    base = world.initial()
    systems = [system_prompt(trait) for trait in world.traits]
    found: dict[str, np.ndarray] = {}
    for name, swap in (("probability", False), ("taught_probability", True)):
        traits: list[Any] = [_of_lessons(trait) if swap else trait for trait in world.traits]
        asked = questions(world.tokenizer, traits, systems=systems)
        found[name] = np.asarray(answers_of(base, asked).probability)[0]
    return found | costs(world, Finished(Prompted(), base, base), text)


def _of_lessons(trait: Any) -> Preference:
    """The trait with its lessons as its questions."""
    own = trait.wording
    return replace(trait, wording=replace(own, questions=own.lessons, lessons=own.questions))
