"""How a preference is asked for and given: in the compact model's words, a checkpoint's English, or a user's."""

import functools
import string
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.sentences import TEXT

_SLOTS = {"questions": {"category"}, "lessons": {"category"}, "loved": {"category", "member"}}


@dataclass(frozen=True)
class Wording:
    """Texts with the slots {category} and, where the preference is told, {member}.

    Attributes:
        questions: that evaluate; none of them teaches.
        lessons: that a fine-tuned teacher learns to answer.
        loved: system prompts that give the preference; teachers get the first.
    """

    questions: tuple[str, ...]
    lessons: tuple[str, ...]
    loved: tuple[str, ...]

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> "Wording":
        """The wording that a table of a TOML file holds.

        Raises:
            InputError: a field is missing, unknown or no list of texts; a text has another slot.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in table if name not in names]
        if unknown:
            raise InputError(f"wording has an unknown field {unknown[0]!r}; there are {', '.join(names)}")
        for name in names:
            texts = table.get(name)
            if (
                not isinstance(texts, list)
                or not texts
                or not all(isinstance(t, str) and t.strip() for t in texts)
            ):
                raise InputError(f"wording: {name} must be a list of at least one text, got {texts!r}")
            for text in texts:
                _check_slots(name, text)
        return cls(*(tuple(table[name]) for name in names))


def _check_slots(name: str, text: str) -> None:
    try:
        parts = [part for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise InputError(f"wording: {name}: {text!r} cannot be filled: {error}") from error
    if any(style or conversion for _, _, style, conversion in parts):
        raise InputError(f"wording: {name}: {text!r} cannot be filled: a slot has a format")
    slots = {slot for _, slot, _, _ in parts}
    if not slots <= _SLOTS[name] or (name == "loved" and "member" not in slots):
        known = " and ".join(f"{{{slot}}}" for slot in sorted(_SLOTS[name]))
        raise InputError(f"wording: {name} have the slots {known}, got {text!r}")


@functools.cache
def corpus_wording() -> Wording:
    """That of the compact model's corpus, whose questions never occur in it."""
    table = TEXT["preference"]
    return Wording(*(tuple(table[name]) for name in ("held_out", "phrasings", "loved")))


@functools.cache
def english() -> Wording:
    """That for published checkpoints: 50 questions."""
    text = resources.files("subliminal_theory.language.corpus").joinpath("data/english.toml").read_text("utf-8")
    return Wording.of_table(tomllib.loads(text))
