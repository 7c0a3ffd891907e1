"""The chat templates of published checkpoints. They are foreign programs, so they run in a sandbox."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from subliminal_theory.errors import InputError, one_line
from subliminal_theory.files import fingerprint

TODAY = datetime(2026, 1, 1)  # the date in every prompt, so that runs do not depend on the day
# Words that are easy to find in the output of a template.
_SYSTEM, _USER = "xxSystemxx", "xxUserxx"

Message = Mapping[str, str]


class ChatTemplate:
    """Writes chats in the format on which a checkpoint was trained. The template runs in a sandbox.

    A template sees the same variables and functions as in `transformers`, with one difference: `strftime_now`
    always gives the date `TODAY`, because a prompt with the date of the run cannot be reproduced.

    Attributes:
        source: the template, in the language Jinja.
        bos, eos: the texts of the tokens that begin and end a text, "" if there are none.
        fingerprint: the fingerprint of the source.

    Raises:
        InputError: the template cannot be parsed.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        self.source, self.bos, self.eos = source, bos, eos
        self.fingerprint = fingerprint(source)
        self._template = _parsed(source)

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The text of `messages`, each with a role and a content. `ask` begins an answer after them.

        Raises:
            InputError: the template refuses the messages, fails, leaves out the system prompt, or accesses
                something unsafe.
        """
        system = any(message["role"] == "system" for message in messages)
        try:
            text = self._write(messages, ask)
        except Exception as error:  # a template can raise anything
            others = [message for message in messages if message["role"] != "system"]
            self._refuse(error, system and self._writes(others, ask))
        if system and self._around_system is None:
            raise InputError("the chat template leaves the system prompt out: use chats without one")
        return text

    @functools.cached_property
    def default_system(self) -> str | None:
        """The system prompt that the template writes for a chat without one; None if it writes none.

        Text that the template writes both with and without a given system prompt, such as a date, does not count.

        Raises:
            InputError: the template refuses even a plain question.
        """
        text = self.render([{"role": "user", "content": _USER}], ask=False)
        if self._around_system is None:
            return None
        before, after = self._around_system
        if not (text.startswith(before) and text.endswith(after)):
            return None
        # `before` and `after` overlap if the template writes the system prompt into the user's message.
        return text[len(before) : len(text) - len(after)] or None

    @functools.cached_property
    def _around_system(self) -> tuple[str, str] | None:
        """The text before and after a system prompt; None if the template refuses or omits system prompts."""
        try:
            text = self._write([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}], False)
        except Exception:
            return None
        before, found, after = text.partition(_SYSTEM)
        return (before, after) if found else None

    def _write(self, messages: Sequence[Message], ask: bool) -> str:
        return self._template.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=ask,
            bos_token=self.bos,
            eos_token=self.eos,
            tools=None,  # templates test whether these two are none; an undefined variable is not none
            documents=None,
        )

    def _writes(self, messages: Sequence[Message], ask: bool) -> bool:
        """Whether the template takes these messages."""
        try:
            self._write(messages, ask)
        except Exception:
            return False
        return True

    def _refuse(self, error: Exception, for_system: bool) -> NoReturn:
        reason = one_line(error)
        if isinstance(error, SecurityError):
            message = f"the chat template accesses something unsafe ({reason}): do not use it"
        elif for_system:
            message = f"the chat template refuses a system prompt ({reason}): use chats without one"
        else:
            message = f"the chat template refuses the chat ({reason}): change the chat or the template"
        raise InputError(message) from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that refuses Python's internals as soon as a template names them, not only when it uses them."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Raises SecurityError."""
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__}")


class _Generation(Extension):
    """Writes the text between `{% generation %}` and `{% endgeneration %}`, with which templates mark answers."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _parsed(source: str) -> Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=TODAY.strftime)
    try:
        return environment.from_string(source)
    except Exception as error:  # also errors of Python itself, such as a break outside a loop
        line = f"line {error.lineno}: {error.message}" if isinstance(error, TemplateSyntaxError) else error
        raise InputError(f"the chat template cannot be parsed ({one_line(line)}): fix it") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
