"""Chats as text for a checkpoint: with its chat template, or as plain lines if it has none."""

import contextlib
from collections.abc import Iterator, Sequence

from subliminal_theory.errors import InputError, shown
from subliminal_theory.language.hub.chat_template import ChatTemplate, Message
from subliminal_theory.language.text import Chat


class ChatWriter:
    """Writes prompts and whole chats.

    A checkpoint without a template (a base model) gets a plain form: the system prompt (if any), the user's text
    and the answer, separated by newlines.

    Attributes:
        template: the chat template; None for the plain form.
        stops: the texts of the tokens that end an answer.

    Raises:
        InputError: both methods raise it if the template refuses the chat.
    """

    def __init__(self, template: ChatTemplate | None, stops: Sequence[str]) -> None:
        self.template, self.stops = template, tuple(stops)

    def prompt(self, chat: Chat) -> str:
        """The text before the answer, which a model is given."""
        return self._write(before_answer(chat), ask=True)

    def whole(self, chat: Chat, prompt: str) -> str:
        """The prompt and the answer. The template's text after them is kept only if it has one of `stops`.

        Raises:
            InputError: the text does not begin with the prompt, or the template changes or cuts the answer.
        """
        answer = chat.answer
        text = self._write([*before_answer(chat), {"role": "assistant", "content": answer}], ask=False)
        if not text.startswith(prompt):
            raise InputError(
                "the chat template writes a chat that does not begin with its own prompt: "
                f"use another template: {shown(chat.user)}"
            )
        if answer not in text[len(prompt) :]:
            answer = answer.strip()  # many templates strip answers
        start = text.find(answer, len(prompt))
        if start < 0 or self._stops_in(text[len(prompt) : start]):
            raise InputError(
                f"the chat template changes or cuts the answer {shown(chat.answer)}: use another template"
            )
        end = start + len(answer)
        return text if self._stops_in(text[end:]) else text[:end]

    def _stops_in(self, text: str) -> bool:
        return any(stop in text for stop in self.stops)

    def _write(self, messages: Sequence[Message], ask: bool) -> str:
        if self.template is not None:
            return self.template.render(messages, ask=ask)
        return "\n".join([message["content"] for message in messages] + [""] * ask)


def before_answer(chat: Chat) -> list[Message]:
    """The system prompt (if any) and the user's text, as messages."""
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    return [*system, {"role": "user", "content": chat.user}]


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Prefix the message of every InputError raised inside with a place."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
