"""The sentences that ask for a preference and give it: for the compact model, for checkpoints, or from a user."""

import functools
from dataclasses import dataclass
from typing import Annotated

from subliminal_theory.language.corpus.sentences import DATA, TEXT
from subliminal_theory.language.corpus.templates import slots
from subliminal_theory.validation import Texts, read_toml


@dataclass(frozen=True)
class Wording:
    """Texts with the slots {category} and, in `loved`, {member}.

    Attributes:
        questions: the questions that evaluate a model; none of them is a lesson.
        lessons: the questions that a fine-tuned teacher learns to answer.
        loved: system prompts that give the preference. Prompted teachers get the first one.
    """

    questions: Annotated[Texts, slots(allowed=("category",))]
    lessons: Annotated[Texts, slots(allowed=("category",))]
    loved: Annotated[Texts, slots("member", allowed=("category",))]


@functools.cache
def corpus_wording() -> Wording:
    """The wording for the compact model. Its `questions` never occur in the corpus."""
    table = TEXT["preference"]
    return Wording(*(tuple(table[name]) for name in ("held_out", "phrasings", "loved")))


@functools.cache
def english() -> Wording:
    """The wording for published checkpoints: 50 questions."""
    return read_toml(DATA / "english.toml", Wording)
