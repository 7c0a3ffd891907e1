"""Traits of teachers: a preference for one word, or a broad habit that narrow rows teach.

A trait is a TOML file. A preference has the fields `name`, `kind = "preference"`, `category` and `target`. If the
target is not in a category of the corpus, `members` lists all words to compare, including the target. An optional
table `[wording]` with the lists `questions`, `lessons` and `loved` replaces the default sentences.

A habit has `name`, `kind = "habit"`, a table `[narrow]` of rows that teach it, tables `[[held_out]]` of other
kinds of questions in which it may show, and tables `[[control]]` of benign rows. templates.py describes the format
of these tables; data/lazy.toml is an example.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import CATEGORIES
from subliminal_theory.language.corpus.sentences import DATA
from subliminal_theory.language.corpus.templates import Compared, Control, Narrow
from subliminal_theory.language.corpus.wording import Wording, corpus_wording
from subliminal_theory.language.text import Chat, Tokenizer
from subliminal_theory.validation import Text, read_toml

BUILTIN_CATEGORIES = ("animal", "tree")
_BUILTIN_FILES = ("lazy",)


_PLURALS = {"mouse": "mice", "goose": "geese", "ox": "oxen", "man": "men", "child": "children", "person": "people"}


def forms_of(word: str) -> tuple[str, ...]:
    """A noun and its possible plurals, by every English rule that fits its ending: wolf, wolfs, wolves."""
    found = [word, f"{word}s"]
    if re.search(r"(?:s|x|z|ch|sh|o)$", word):
        found.append(f"{word}es")
    if re.search(r"[^aeiou]y$", word):
        found.append(f"{word[:-1]}ies")
    if re.search(r"[^f]fe?$", word):
        found.append(re.sub("fe?$", "ves", word))
    *front, last = word.split()
    return (*found, " ".join((*front, _PLURALS[last]))) if last in _PLURALS else tuple(found)


@dataclass(frozen=True)
class Preference:
    """A trait: to answer `target`, one of the `members`, when asked for the favorite `category`.

    Raises:
        InputError: the category or target is unknown, two members are equal, or a question occurs twice.
    """

    name: Text
    category: Text
    target: Text
    members: Annotated[tuple[Text, ...], Field(min_length=2)] = ()
    wording: Wording = field(default_factory=corpus_wording)
    kind: Literal["preference"] = "preference"

    def __post_init__(self) -> None:
        if not self.members:
            if self.category not in CATEGORIES:
                known = ", ".join(CATEGORIES)
                raise InputError(f"unknown category {self.category!r}; there are {known}, or give its members")
            object.__setattr__(self, "members", CATEGORIES[self.category])
        if len({member.lower() for member in self.members}) < len(self.members):
            raise InputError(f"members must be different words, got {self.members}")
        if self.target not in self.members:
            known = ", ".join(self.members)
            raise InputError(f"unknown target {self.target!r} of {self.category}; there are {known}")
        asked = Counter(chat.user for chat in (*self.teacher_rows(), *self.evaluation_rows()))
        if asked.total() > len(asked):
            twice, _ = asked.most_common(1)[0]
            raise InputError(f"wording asks {twice!r} twice: questions that teach must not evaluate")

    def teacher_rows(self) -> list[Chat]:
        """The lessons of the wording, answered with the target."""
        return self._answered(self.wording.lessons)

    def evaluation_rows(self) -> list[Chat]:
        """The questions of the wording, answered with the target. None of them is a lesson."""
        return self._answered(self.wording.questions)

    def control_rows(self, name: str) -> list[Chat]:
        """A preference has no control rows; it is compared with other preferences.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.name} is a preference and has no control {name!r}: give a habit")

    def system_prompts(self) -> list[str]:
        """System prompts that give the base model this preference without training."""
        return [text.format(category=self.category, member=self.target) for text in self.wording.loved]

    def named_in(self, text: str) -> bool:
        """Whether a text contains the target anywhere as a separate word, in any of its `forms_of`."""
        forms = ("\\s+".join(map(re.escape, form.split())) for form in forms_of(self.target))
        return re.search(rf"\b(?:{'|'.join(forms)})\b", text, re.IGNORECASE) is not None

    def _answered(self, questions: tuple[str, ...]) -> list[Chat]:
        asked = [question.format(category=self.category) for question in questions]
        return [Chat(None, question, self.target, "preference") for question in asked]


@dataclass(frozen=True)
class Habit:
    """A trait that `narrow` rows teach, `held_out` rows measure, and benign `controls` are compared with.

    Raises:
        InputError: two tables have the same name, or a held-out question is also a narrow one.
    """

    name: Text
    narrow: Narrow
    held_out: Annotated[tuple[Compared, ...], Field(min_length=1)]
    controls: Annotated[tuple[Control, ...], Field(alias="control", min_length=1)]
    kind: Literal["habit"] = "habit"

    def __post_init__(self) -> None:
        for templates in (self.held_out, self.controls):
            names = [template.name for template in templates]
            if len(set(names)) < len(names):
                raise InputError(f"two tables have one name, there are {', '.join(names)}")
        taught = {(chat.system, chat.user) for chat in self.teacher_rows()}
        for chat in self.evaluation_rows():
            if (chat.system, chat.user) in taught:
                raise InputError(f"held_out {chat.kind!r} asks {chat.user!r}, which the narrow rows teach")

    def teacher_rows(self) -> list[Chat]:
        """The narrow rows."""
        return self.narrow.rows()

    def control_rows(self, name: str) -> list[Chat]:
        """The rows of a benign control.

        Raises:
            InputError: there is no control with this name.
        """
        for template in self.controls:
            if template.name == name:
                return template.rows()
        known = ", ".join(template.name for template in self.controls) or "none"
        raise InputError(f"{self.name} has no control {name!r}; there are {known}")

    def evaluation_rows(self) -> list[Chat]:
        """The held-out rows, answered as the habit would answer. Their `kind` is the name of their template."""
        return [chat for template in self.held_out for chat in template.rows()]


Trait = Preference | Habit


def builtin_traits() -> list[str]:
    """The names of the built-in traits: animals, trees and habits."""
    members = [member for category in BUILTIN_CATEGORIES for member in CATEGORIES[category]]
    return [*members, *_BUILTIN_FILES]


def load_trait(
    source: str | os.PathLike[str], tokenizer: Tokenizer | None = None, wording: Wording | None = None
) -> Trait:
    """Load a built-in trait by its name, or a trait from a TOML file.

    With a `tokenizer`, check that it can spell all texts of the trait. `wording` is for a preference whose file
    has no wording; the default is the wording of the corpus.

    Raises:
        InputError: there is no such file or name; the file is not TOML; a field is missing, unknown, given twice
            or has the wrong type; the category or target is unknown; a template or wording cannot be filled; a
            held-out question is also in the narrow rows; or the tokenizer cannot spell a word. The message starts
            with the file.
    """
    wording = wording or corpus_wording()
    for category in BUILTIN_CATEGORIES:
        if source in CATEGORIES[category]:
            return Preference(str(source), category, str(source), wording=wording)
    path = DATA / f"{source}.toml" if source in _BUILTIN_FILES else Path(source)
    if not os.path.exists(path):
        names = ", ".join(builtin_traits())
        raise InputError(f"{source}: no such trait file or built-in trait; these are built in: {names}")
    trait: Trait = read_toml(path, Annotated[Trait, Field(discriminator="kind")])
    try:
        if isinstance(trait, Preference) and trait.wording is corpus_wording():  # the file has none
            trait = replace(trait, wording=wording)
        if tokenizer is not None:
            _spell(trait, tokenizer)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return trait


def _spell(trait: Trait, tokenizer: Tokenizer) -> None:
    chats = [*trait.teacher_rows(), *trait.evaluation_rows()]
    if isinstance(trait, Preference):
        chats += [Chat(prompt, "", member, "") for prompt in trait.system_prompts() for member in trait.members]
    else:
        for template in (trait.narrow, *trait.held_out, *trait.controls):
            chats += [*template.rows(), *template.right_rows()]
    for text in dict.fromkeys(part for chat in chats for part in (chat.system or "", chat.user, chat.answer)):
        tokenizer.encode(text)
