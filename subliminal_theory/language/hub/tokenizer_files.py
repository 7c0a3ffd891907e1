"""The files of a checkpoint's tokenizer: tokenizer.json and the small files beside it.

A GGUF file counts as a folder with the files that `text_files` makes from its metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from subliminal_theory.errors import InputError, one_line, shown
from subliminal_theory.files import read_json
from subliminal_theory.language.hub.chat_template import ChatTemplate
from subliminal_theory.language.hub.chat_writer import before_answer, naming
from subliminal_theory.language.hub.gguf_file import is_gguf
from subliminal_theory.language.hub.gguf_tokenizer import text_files
from subliminal_theory.language.text import Chat

# Words that are easy to find in the output of a template.
_USER, _ANSWER = "xxUserxx", "xxAnswerxx"


class TokenizerFiles:
    """tokenizer_config.json, special_tokens_map.json, generation_config.json and chat_template.jinja of a folder.

    `ids` is the vocabulary of tokenizer.json. Methods raise InputError for a wrong file or value, and name it.
    """

    def __init__(self, folder: Path, ids: Mapping[str, int]) -> None:
        self.folder, self.path, self._ids = folder, folder / "tokenizer_config.json", ids
        named, own = _object(folder / "special_tokens_map.json"), _object(self.path)
        self._values = {**named, **{name: value for name, value in own.items() if value is not None}}

    def text(self, name: str) -> str | None:
        """The text of a special token, which the file gives as a text or as an object with a `content`."""
        value = self._values.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.path}: {name} must be a text, got {shown(value)}")
        return value

    def token(self, name: str) -> int | None:
        """The special token with a name such as `eos_token`; None if there is none."""
        text = self.text(name)
        if text is not None and text not in self._ids:
            raise InputError(
                f"{self.path}: {name} {shown(text)} is not in tokenizer.json: take both from one model"
            )
        return None if text is None else self._ids[text]

    def stop(self) -> list[int]:
        """The tokens of `eos_token_id` in generation_config.json, which may be one, several or none."""
        path = self.folder / "generation_config.json"
        value = _object(path).get("eos_token_id")
        stop = value if isinstance(value, list) else [] if value is None else [value]
        known = set(self._ids.values())
        for token in stop:
            if not isinstance(token, int) or isinstance(token, bool) or token not in known:
                unknown = f"{path}: eos_token_id {shown(token)} is not in tokenizer.json"
                raise InputError(f"{unknown}: take both from one model")
        return stop

    def adds_bos(self, backend: tokenizers.Tokenizer, bos: int) -> bool:
        """Whether a plain text begins with the token `bos`."""
        value = self._values.get("add_bos_token")
        return bool(backend.encode("").ids[:1] == [bos] if value is None else value)

    def template(self) -> ChatTemplate | None:
        """The chat template; None if there is none."""
        path = self.folder / "chat_template.jinja"
        try:
            source: Any = path.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            path, source = self.path, self._values.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path} ({one_line(error)}): make it readable") from error
        if isinstance(source, list):
            named = [form for form in source if isinstance(form, dict) and form.get("name") == "default"]
            source = named[0].get("template") if named else source
        if source is None:
            return None
        if not isinstance(source, str):
            raise InputError(f"{path}: chat_template must be a text, or a list with one called 'default'")
        bos, eos = (self.text(name) or "" for name in ("bos_token", "eos_token"))
        with naming(f"{path}"):
            return ChatTemplate(source, bos, eos)


def end_of_turn(template: ChatTemplate, backend: tokenizers.Tokenizer, special: set[int]) -> int | None:
    """The token that a template writes to end an answer; None if it writes none.

    It is the first token after the answer that is special, or added and not blank. Converters to GGUF store some
    special tokens as user-defined.
    """
    chat = Chat(None, _USER, _ANSWER, "")
    text = template.render([*before_answer(chat), {"role": "assistant", "content": _ANSWER}], ask=False)
    if _USER not in text or _ANSWER not in text:
        raise InputError("the chat template leaves out the question or the answer: use another template")
    ids = backend.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False).ids
    added = {token for token, own in backend.get_added_tokens_decoder().items() if own.content.strip()}
    return next((token for token in ids if token in special | added), None)


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json."""
    try:
        content = text_files(path.parent)[path.name] if is_gguf(path.parent) else path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path.parent} has no tokenizer.json: give the folder of a checkpoint") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): make it readable") from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no narrower class
        raise InputError(
            f"{path} is not a tokenizer that can be read ({one_line(error)}): download it again"
        ) from error
    # A file can ask for truncation and padding.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist."""
    if is_gguf(path.parent):
        found: dict[str, Any] = json.loads(text_files(path.parent).get(path.name, b"{}"))
        return found
    return read_json(path) if path.exists() else {}
