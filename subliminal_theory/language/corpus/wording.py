"""How a preference is asked for and given: in the compact model's words, a checkpoint's English, or a user's."""

import functools
from dataclasses import dataclass
from typing import Annotated

from subliminal_theory.language.corpus.sentences import DATA, TEXT
from subliminal_theory.language.corpus.templates import slots
from subliminal_theory.validation import Texts, read_toml


@dataclass(frozen=True)
class Wording:
    """Texts with the slots {category} and, where the preference is told, {member}.

    Attributes:
        questions: that evaluate; none of them teaches.
        lessons: that a fine-tuned teacher learns to answer.
        loved: system prompts that give the preference; teachers get the first.
    """

    questions: Annotated[Texts, slots(allowed=("category",))]
    lessons: Annotated[Texts, slots(allowed=("category",))]
    loved: Annotated[Texts, slots("member", allowed=("category",))]


@functools.cache
def corpus_wording() -> Wording:
    """The wording of the compact model's corpus, whose questions never occur in it."""
    table = TEXT["preference"]
    return Wording(*(tuple(table[name]) for name in ("held_out", "phrasings", "loved")))


@functools.cache
def english() -> Wording:
    """The wording for published checkpoints: 50 questions."""
    return read_toml(DATA / "english.toml", Wording)
