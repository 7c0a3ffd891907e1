"""Questions to a model and its answers, as rows of a JSONL file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from subliminal_theory.errors import InputError
from subliminal_theory.runs import write_atomically
from subliminal_theory.validation import first_fault

_BOM = b"\xef\xbb\xbf"
# Other programs store more parts of a chat under these keys. A row that has one cannot be read as a plain chat.
_SAID = (
    "system_prompt", "tools", "functions", "tool_calls", "function_call", "reasoning_content", "reasoning",
    "thinking",
)  # fmt: skip
_NAMES = {"prompt": ("system", "prompt", "completion"), "messages": ("system", "user", "assistant")}


@dataclass(frozen=True)
class Completion:
    """One question and its answer.

    Attributes:
        prompt: what the user says; may be empty.
        completion: what the assistant answers. A model may answer "", but files may not contain an empty answer.
        system: the system message; None means no message, and "" is a message without text.
        base: the name of the base of the model that wrote the answer, if known.
        teacher: the name of the model that wrote the answer, if known. Neither name matters when rows are
        compared.
    """

    prompt: str
    completion: str
    system: str | None = None
    base: str | None = field(default=None, compare=False)
    teacher: str | None = field(default=None, compare=False)


def read_jsonl(path: Path) -> list[Completion]:
    """Read the rows of a JSONL file, which has one JSON object on each line.

    A row has one of two forms; a file may mix them. The first is {"prompt": TEXT, "completion": TEXT} with an
    optional "system": TEXT. The second is {"messages": [{"role": ROLE, "content": TEXT}, ...]} with an optional
    system message, one user message and one assistant message. "base" and "teacher" may give names. Other keys are
    ignored, but keys that hold more of the chat (tools, tool calls, reasoning, a system prompt under another name)
    are refused. A key with the value null counts as missing.

    The file is UTF-8, with or without a byte order mark. Lines end with LF or CRLF. Blank lines are allowed only
    at the end of the file.

    Raises:
        InputError: the file cannot be read or has no rows, or some lines are bad. The message then gives the
            number and fault of the first bad line and how many more there are.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a JSONL file") from error
    data = data.removeprefix(_BOM).rstrip(b" \t\r\n")
    if not data:
        raise InputError(f"{path} has no rows: give a JSONL file that has some")
    rows, bad = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            rows.append(_Line.model_validate_json(line, strict=True).row())
        except ValidationError as error:
            bad.append((number, first_fault(error)))
        except ValueError as error:
            bad.append((number, str(error)))
    if bad:
        (number, fault), rest = bad[0], len(bad) - 1
        more = f", and {rest} more bad line{'s' if rest > 1 else ''}" if rest else ""
        raise InputError(f"{path}, line {number}: {fault}{more}; fix or remove the bad lines; no row was read")
    return rows


def write_jsonl(path: Path, rows: Iterable[Completion], form: Literal["prompt", "messages"] = "prompt") -> None:
    """Write rows in one of the two forms of `read_jsonl`. `read_jsonl` then returns exactly these rows.

    The file is written atomically: an earlier file of the same name stays until the new one is complete.

    Raises:
        InputError: there is no row; a completion is empty or a text cannot be encoded; the form is unknown; the
            disk is full or the folder cannot be written.
    """
    if form not in _NAMES:
        raise InputError(f"no form of rows is called {form!r}: give prompt or messages")
    lines = []
    for number, row in enumerate(rows, 1):
        named = zip(_NAMES[form], (row.system, row.prompt, row.completion), strict=True)
        texts = {name: text for name, text in named if text is not None}
        messages = [{"role": role, "content": text} for role, text in texts.items()]
        names = {name: own for name in ("base", "teacher") if (own := getattr(row, name)) is not None}
        content = {**(texts if form == "prompt" else {"messages": messages}), **names}
        if not row.completion:
            raise InputError(f"cannot write row {number} to {path}: an empty completion")
        try:
            lines.append(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise InputError(f"cannot write row {number} to {path}: half a character ({error.reason})") from error
    if not lines:
        raise InputError(f"there are no rows to write to {path}")
    write_atomically(path, b"".join(lines))


class _Spoken(BaseModel, extra="allow"):
    """A JSON object that may have extra keys, but none that hold more of the chat."""

    @model_validator(mode="after")
    def _nothing_else_is_said(self) -> Self:
        for name in _SAID:
            if (self.model_extra or {}).get(name):
                raise PydanticCustomError("said", "{name} is not read: take it out", {"name": name})
        return self


class _Message(_Spoken):
    role: Literal["system", "user", "assistant"]
    content: str


class _Line(_Spoken):
    prompt: str | None = None
    completion: str | None = None
    system: str | None = None
    messages: list[_Message] | None = None
    # Other programs may use these keys for other things; only a string counts as a name.
    base: Any = None
    teacher: Any = None

    def row(self) -> Completion:
        """The row of a line.

        Raises:
            ValueError: says what is wrong with the line.
        """
        if self.messages is None:
            system, prompt, completion = self.system, self.prompt, self.completion
        elif self.prompt is not None or self.completion is not None:
            raise ValueError("both forms at once, messages and a prompt or completion")
        else:
            roles = [message.role for message in self.messages]
            if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
                raise ValueError(f"messages of {roles} instead of (system,) user, assistant")
            system, prompt, completion = [None, *(message.content for message in self.messages)][-3:]
        if prompt is None:
            raise ValueError("no prompt")
        if not completion:
            raise ValueError("no completion" if completion is None else "an empty completion")
        names = (name if isinstance(name, str) else None for name in (self.base, self.teacher))
        return Completion(prompt, completion, system, *names)
