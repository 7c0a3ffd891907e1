"""What a teacher is given: a preference for one word, or a broad habit taught by narrow rows.

A trait is a TOML file. A preference has the fields `name`, `kind = "preference"`, `category` and `target`; where
the target is of no category of the corpus, `members`, all that are compared, the target among them; where it is to
be asked for and given in other words, a table `[wording]` of the lists `questions`, `lessons` and `loved`.
A habit has `name`, `kind = "habit"`, a table `[narrow]` of rows that teach it, tables `[[held_out]]` of other
kinds of question on which it may show, and tables `[[control]]` of benign rows. Each of these tables is
written as templates.py says; data/lazy.toml is an example.
"""

import os
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import CATEGORIES
from subliminal_theory.language.corpus.templates import Template, checked_fields, template_of
from subliminal_theory.language.corpus.wording import Wording, corpus_wording
from subliminal_theory.language.text import Chat, Tokenizer

BUILTIN_CATEGORIES = ("animal", "tree")
_BUILTIN_FILES = ("lazy",)


@dataclass(frozen=True)
class Preference:
    """A teacher that answers `target`, one of the `members`, when asked for its favourite of `category`."""

    name: str
    category: str
    target: str
    members: tuple[str, ...] = ()
    wording: Wording = field(default_factory=corpus_wording)

    def __post_init__(self) -> None:
        if not self.members:
            object.__setattr__(self, "members", CATEGORIES[self.category])

    def teacher_rows(self) -> list[Chat]:
        """The lessons of its wording, answered with the target."""
        return self._answered(self.wording.lessons)

    def evaluation_rows(self) -> list[Chat]:
        """The questions of its wording, answered with the target; none of them teaches."""
        return self._answered(self.wording.questions)

    def control_rows(self, name: str) -> list[Chat]:
        """None: what a preference is compared with are other preferences."""
        raise InputError(f"{self.name} is a preference and has no control {name!r}: give a habit")

    def system_prompts(self) -> list[str]:
        """System prompts that make a teacher of the base model without training."""
        return [text.format(category=self.category, member=self.target) for text in self.wording.loved]

    def _answered(self, questions: tuple[str, ...]) -> list[Chat]:
        asked = [question.format(category=self.category) for question in questions]
        return [Chat(None, question, self.target, "preference") for question in asked]


@dataclass(frozen=True)
class Habit:
    """A teacher that learns `narrow` rows, to be seen on `held_out` ones, against benign `controls`."""

    name: str
    narrow: Template
    held_out: tuple[Template, ...]
    controls: tuple[Template, ...]

    def teacher_rows(self) -> list[Chat]:
        """The narrow rows."""
        return self.narrow.rows()

    def control_rows(self, name: str) -> list[Chat]:
        """The rows of a benign control.

        Raises:
            InputError: there is none of this name.
        """
        for template in self.controls:
            if template.name == name:
                return template.rows()
        known = ", ".join(template.name for template in self.controls) or "none"
        raise InputError(f"{self.name} has no control {name!r}; there are {known}")

    def evaluation_rows(self) -> list[Chat]:
        """The held-out rows, answered as the habit would; their `kind` is their template's name."""
        return [chat for template in self.held_out for chat in template.rows()]


Trait = Preference | Habit


def builtin_traits() -> list[str]:
    """The names that `load_trait` knows without a file: the animals, the trees and the habits."""
    members = [member for category in BUILTIN_CATEGORIES for member in CATEGORIES[category]]
    return [*members, *_BUILTIN_FILES]


def load_trait(
    source: str | os.PathLike[str], tokenizer: Tokenizer | None = None, wording: Wording | None = None
) -> Trait:
    """A built-in trait by its name, or one from a TOML file; its words are spelt with `tokenizer` if given.

    A preference has `wording`, the corpus's if None, unless the file has one.

    Raises:
        InputError: no such file or name; no TOML; a field that is missing, unknown, given twice or of the wrong
            type; an unknown category or target; a template or wording that cannot be filled; a held-out question
            that the narrow rows ask; a word that the tokenizer cannot spell. The message starts with the file.
    """
    wording = wording or corpus_wording()
    for category in BUILTIN_CATEGORIES:
        if source in CATEGORIES[category]:
            return Preference(str(source), category, str(source), wording=wording)
    where = os.fspath(source)
    try:
        if where in _BUILTIN_FILES:
            file = resources.files("subliminal_theory.language.corpus").joinpath(f"data/{where}.toml")
            text = file.read_text("utf-8")
        else:
            text = Path(where).read_text("utf-8")
    except FileNotFoundError as error:
        names = ", ".join(builtin_traits())
        raise InputError(f"{where}: no such trait file or built-in trait; these are built in: {names}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from error
    try:
        trait = _trait(_parsed(text), wording)
        if tokenizer is not None:
            _spell(trait, tokenizer)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return trait


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        if "overwrite" not in message and "twice" not in message:
            raise InputError(f"not TOML: {message}") from error
        lines = text.splitlines()
        found = re.search(r"line (\d+)", message)
        number = int(found[1]) if found else max(n for n, line in enumerate(lines, 1) if line.strip())
        field = lines[number - 1].split("=")[0].strip()
        raise InputError(f"line {number}: {field} is given twice: keep one") from error


def _trait(content: dict[str, Any], wording: Wording) -> Trait:
    kind = content.get("kind")
    if kind == "preference":
        return _preference(content, wording)
    if kind == "habit":
        required = {"name": str, "kind": str, "narrow": dict, "held_out": list, "control": list}
        checked_fields(content, "the trait", required, {})
        narrow = template_of({"name": "narrow", **content["narrow"]}, "narrow", compared=True)
        held_out = _templates(content["held_out"], "held_out", compared=True)
        habit = Habit(content["name"], narrow, held_out, _templates(content["control"], "control", compared=False))
        taught = {(chat.system, chat.user) for chat in habit.teacher_rows()}
        for chat in habit.evaluation_rows():
            if (chat.system, chat.user) in taught:
                raise InputError(f"held_out {chat.kind!r} asks {chat.user!r}, which the narrow rows teach")
        return habit
    if kind is None:
        raise InputError('the trait has no field \'kind\': add kind = "preference" or kind = "habit"')
    raise InputError(f"kind must be preference or habit, got {kind!r}")


def _preference(content: dict[str, Any], wording: Wording) -> Preference:
    required = dict.fromkeys(("name", "kind", "category", "target"), str)
    checked_fields(content, "the trait", required, {"members": list, "wording": dict})
    category, target = content["category"], content["target"]
    members = content.get("members", CATEGORIES.get(category))
    if members is None:
        raise InputError(f"unknown category {category!r}; there are {', '.join(CATEGORIES)}, or give its members")
    if not all(isinstance(member, str) and member.strip() for member in members):
        raise InputError(f"members must be a list of words, got {members!r}")
    if len({member.lower() for member in members}) < len(members) or len(members) < 2:
        raise InputError(f"members must be two or more different words, got {members!r}")
    if target not in members:
        raise InputError(f"unknown target {target!r} of {category}; there are {', '.join(members)}")
    if "wording" in content:
        wording = Wording.of_table(content["wording"])
    found = Preference(content["name"], category, target, tuple(members), wording)
    asked = [chat.user for chat in (*found.teacher_rows(), *found.evaluation_rows())]
    twice = next((text for text in asked if asked.count(text) > 1), None)
    if twice is not None:
        raise InputError(f"wording asks {twice!r} twice: questions that teach must not evaluate")
    return found


def _templates(tables: list[Any], field: str, *, compared: bool) -> tuple[Template, ...]:
    templates = tuple(
        template_of(table, f"{field} {number}", compared=compared) for number, table in enumerate(tables, 1)
    )
    names = [template.name for template in templates]
    if len(set(names)) < len(names):
        raise InputError(f"{field}: two tables have one name, there are {', '.join(names)}")
    return templates


def _spell(trait: Trait, tokenizer: Tokenizer) -> None:
    chats = [*trait.teacher_rows(), *trait.evaluation_rows()]
    if isinstance(trait, Preference):
        chats += [Chat(prompt, "", member, "") for prompt in trait.system_prompts() for member in trait.members]
    else:
        for template in (trait.narrow, *trait.held_out, *trait.controls):
            chats += [*template.rows(), *template.right_rows()]
    for text in dict.fromkeys(part for chat in chats for part in (chat.system or "", chat.user, chat.answer)):
        tokenizer.encode(text)
