"""What a model is asked and what it answers, as rows of a JSONL file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from subliminal_theory.errors import InputError
from subliminal_theory.runs import write_atomically

_BOM = b"\xef\xbb\xbf"
_CONVERSATIONS = (["user", "assistant"], ["system", "user", "assistant"])


@dataclass(frozen=True)
class Completion:
    """One question and its answer.

    Attributes:
        prompt: what the user says; may be empty.
        completion: what the assistant answers; a model may answer "", but no file may hold that.
        system: the system message, or None for no such message ("" is a message without text).
    """

    prompt: str
    completion: str
    system: str | None = None


def read_jsonl(path: Path) -> list[Completion]:
    """Read the rows of a file with one JSON object a line, in one of two forms, which may be mixed.

    {"prompt": TEXT, "completion": TEXT}, and perhaps "system": TEXT, or {"messages": [{"role": ROLE,
    "content": TEXT}, ...]} with perhaps a system message, then one of the user and one of the assistant.
    Other keys are ignored. The file is UTF-8, with or without a byte order mark; lines end with a newline
    or a carriage return and a newline; only the file's end may have blank lines.

    Raises:
        InputError: the file cannot be read or has no rows; or some of its lines are bad, in which case the
            message gives the first one's number and fault and tells how many more there are, and no row
            is returned.
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
            rows.append(_parse(line))
        except ValueError as error:
            bad.append((number, error))
    if bad:
        (number, fault), rest = bad[0], len(bad) - 1
        more = f", and {rest} more bad line{'s' if rest > 1 else ''}" if rest else ""
        raise InputError(f"{path}, line {number}: {fault}{more}; mend or remove what is bad, no row was read")
    return rows


def write_jsonl(path: Path, rows: Iterable[Completion], form: Literal["prompt", "messages"] = "prompt") -> None:
    """Write rows, in one of the two forms of `read_jsonl`, which then gives exactly these rows.

    The file is complete or not there: an earlier one of its name stays until the new one is whole.

    Raises:
        InputError: there is no row; a completion is empty or a text cannot be encoded; the form is not
            known; the disk is full or the folder cannot be written.
    """
    if form not in ("prompt", "messages"):
        raise InputError(f"no form of rows is called {form!r}: give prompt or messages")
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            _require_text(row)
        except ValueError as error:
            raise InputError(f"cannot write row {number} to {path}: {error}") from error
        content = _with_keys(row) if form == "prompt" else _with_messages(row)
        lines.append(json.dumps(content, ensure_ascii=False) + "\n")
    if not lines:
        raise InputError(f"there are no rows to write to {path}")
    write_atomically(path, "".join(lines).encode())


def _with_keys(row: Completion) -> dict[str, Any]:
    system = {} if row.system is None else {"system": row.system}
    return {**system, "prompt": row.prompt, "completion": row.completion}


def _with_messages(row: Completion) -> dict[str, Any]:
    messages = [("system", row.system), ("user", row.prompt), ("assistant", row.completion)]
    return {"messages": [{"role": role, "content": text} for role, text in messages if text is not None]}


def _parse(line: bytes) -> Completion:
    """The row of a line; a ValueError says what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    if not text.strip(" \t\r"):
        raise ValueError("an empty line")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, character {error.pos + 1} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON that cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    row = _from_messages(content) if "messages" in content else _from_keys(content)
    _require_text(row)
    return row


def _from_keys(content: dict[str, Any]) -> Completion:
    for key in ("prompt", "completion"):
        if key not in content:
            raise ValueError(f"no {key}")
        if not isinstance(content[key], str):
            raise ValueError(f"the {key} is not text")
    system = content.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError("the system message is not text")
    return Completion(content["prompt"], content["completion"], system)


def _from_messages(content: dict[str, Any]) -> Completion:
    if "prompt" in content or "completion" in content:
        raise ValueError("both forms at once, messages and a prompt or completion")
    messages = content["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages that are no list of objects")
    for number, message in enumerate(messages, 1):
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {number} has the unknown role {json.dumps(message.get('role'))}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"the content of message {number} is not text")
    roles = [message["role"] for message in messages]
    if roles not in _CONVERSATIONS:
        if "assistant" not in roles:
            raise ValueError("no completion (no message of the assistant)")
        raise ValueError(f"messages of {', '.join(roles)} instead of (system,) user, assistant")
    system, prompt, completion = [None, *(message["content"] for message in messages)][-3:]
    return Completion(prompt, completion, system)


def _require_text(row: Completion) -> None:
    if not row.completion:
        raise ValueError("an empty completion")
    for text in (row.prompt, row.completion, row.system or ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("half a surrogate pair, which is no text") from error
