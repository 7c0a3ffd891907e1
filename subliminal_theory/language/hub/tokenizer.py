"""Text of real checkpoints: their tokenizer and chat template, with the interface of `WordTokenizer`.

A checkpoint's folder holds tokenizer.json and tokenizer_config.json, and perhaps chat_template.jinja,
special_tokens_map.json and generation_config.json. Its chat template writes a chat as one text that holds the
special tokens by name; that text is split into tokens with nothing added.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.chat_template import ChatTemplate, Message, one_line
from subliminal_theory.language.text import Chat, Encoded, Prompts, left_padded

# Words to be found again in what a template writes.
_USER, _ANSWER = "xxUserxx", "xxAnswerxx"


class CheckpointTokenizer:
    """Encodes and decodes chats as a checkpoint expects them; `load` makes one.

    A checkpoint without chat template (a base model) gets a plain form: the system prompt, if any, the user's
    text and the answer, a newline between them, with the token that begins a text in front if the checkpoint
    uses one (`add_bos_token` of tokenizer_config.json or, where that says nothing, tokenizer.json itself).

    Text of users never becomes a special token: a chat that holds the name of one is refused.

    Attributes:
        pad: the token in front of rows that are shorter than others: `pad_token`, or else the first of `stop`.
        stop: the tokens that end an answer: `eos_token`, `eos_token_id` of generation_config.json, and the first
            special token that the chat template writes after an answer.
        template: how chats are written; None for the plain form.
        fingerprint: SHA-256 of tokenizer.json and the template's source.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: ChatTemplate | None,
        *,
        special: Iterable[int],
        stop: tuple[int, ...],
        pad: int,
        front: tuple[int, ...],
        fingerprint: str,
    ) -> None:
        self.template, self.stop, self.pad, self.fingerprint = template, stop, pad, fingerprint
        self._backend, self._front = backend, front
        self._special = frozenset(special) | {pad, *stop, *front}
        self._stop_texts = backend.decode_batch([[token] for token in stop], skip_special_tokens=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "CheckpointTokenizer":
        """The tokenizer of a checkpoint's folder.

        Raises:
            InputError: there is no tokenizer.json, a file cannot be read or is malformed, a token that is named
                is not in the vocabulary, no token ends an answer, or the template refuses a plain chat.
        """
        folder = Path(folder)
        content, backend = _backend(folder / "tokenizer.json")
        config = _Config(folder, backend.get_vocab())
        template = config.template()
        bos, eos, pad = (config.named(f"{name}_token") for name in ("bos", "eos", "pad"))
        special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        special |= {token for token in (bos, eos, pad) if token is not None}
        stop = [eos, *config.stop()]
        if template is not None:
            with _naming(f"{folder}"):
                stop.append(_end_of_turn(template, backend, special))
        stops = tuple(dict.fromkeys(token for token in stop if token is not None))
        if not stops:
            raise InputError(f"{folder} names no token that ends a text: add eos_token to tokenizer_config.json")
        source = "" if template is None else template.source
        return cls(
            backend,
            template,
            special=special,
            stop=stops,
            pad=stops[0] if pad is None else pad,
            front=() if template is not None or bos is None or not config.adds_bos(backend, bos) else (bos,),
            fingerprint=hashlib.sha256(content + source.encode("utf-8", "surrogatepass")).hexdigest(),
        )

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def check_fits(self, vocabulary: int) -> None:
        """Whether a model whose embedding has `vocabulary` rows can read all tokens; more rows are fine.

        Raises:
            InputError: a token without a row.
        """
        if max(self._backend.get_vocab().values()) >= vocabulary:
            sizes = f"the tokenizer has {len(self)} tokens, the embedding {vocabulary} rows"
            raise InputError(f"{sizes}: they are of different models")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone, with nothing in front of it or behind it.

        Raises:
            InputError: the text holds a special token or half a character.
        """
        ids = self._spell([_whole(text)])[text]
        self._refuse_special(text, ids)
        return ids

    def decode(self, rows: Sequence[Sequence[int]] | Int32[np.ndarray, "rows length"]) -> list[str]:
        """The text of each row up to its first token of `stop`, without special tokens."""
        cut = []
        for row in rows:
            answer = itertools.takewhile(lambda token: token not in self.stop, map(int, row))
            cut.append([token for token in answer if token not in self._special])
        return self._backend.decode_batch(cut, skip_special_tokens=False)

    def spellings(self, word: str) -> list[list[int]]:
        """The tokens of an answer that is this word: as it is given, with a capital letter, in small letters."""
        cases = dict.fromkeys((word, word[:1].upper() + word[1:], word.lower()))
        chats = [Chat(None, "?", spelt, "") for spelt in cases]
        answers = [itertools.takewhile(lambda t: t not in self.stop, own) for _, own in self._sequences(chats)]
        return [list(tokens) for tokens in dict.fromkeys(map(tuple, answers))]

    def encode_prompts(self, chats: Sequence[Chat], length: int) -> Prompts:
        """What a model is given to answer: the chats without their answers, in `length` columns.

        Raises:
            InputError: a prompt longer than `length`, one that the template refuses, or a special token in a
                text; the row is named.
        """
        asked = self._asked(chats)
        ids = self._spell(asked)
        return Prompts(*left_padded([[*self._front, *ids[text]] for text in asked], chats, length, self.pad))

    def encode_chats(self, chats: Sequence[Chat], length: int) -> Encoded:
        """Chats to be learnt, in `length` columns; a chat of n tokens takes n - 1.

        An answer is what follows the prompt's tokens, up to and including its token of `stop`; what the template
        writes behind that is dropped, and the first of `stop` is added where the template writes none.

        Raises:
            InputError: as `encode_prompts`; a chat longer than that or without answer, or one that does not
                begin with its prompt; the row is named.
        """
        sequences = self._sequences(chats)
        for row, (_, answer) in enumerate(sequences):
            if not answer:
                raise InputError(f"row {row} has no answer: {chats[row].user!r}")
        whole = [[*prompt, *answer] for prompt, answer in sequences]
        tokens, padding = left_padded([ids[:-1] for ids in whole], chats, length, self.pad)
        targets, _ = left_padded([ids[1:] for ids in whole], chats, length, self.pad)
        answered = np.array([len(answer) for _, answer in sequences], int).reshape(-1, 1)
        weights = (np.arange(length) >= length - answered).astype(np.float32)
        return Encoded(tokens, padding, targets, weights)

    def lengths(self, chats: Sequence[Chat]) -> tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]:
        """Columns that each row takes in `encode_prompts` and in `encode_chats`.

        Raises:
            InputError: as `encode_chats`; a chat without answer is as long as its prompt.
        """
        sequences = self._sequences(chats)
        counts = [(len(prompt), len(prompt) + max(len(answer) - 1, 0)) for prompt, answer in sequences]
        prompts, whole = np.array(counts, np.int32).reshape(-1, 2).T
        return prompts, whole

    def _sequences(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each prompt, and of each answer with its end (none for an empty answer)."""
        asked, told = self._asked(chats), []
        for row, chat in enumerate(chats):
            with _naming(f"row {row}"):
                told.append(self._told(chat, asked[row]) if chat.answer else "")
        ids, sequences = self._spell([*asked, *told]), []
        for row, chat in enumerate(chats):
            prompt, answer = ids[asked[row]], list[int]()
            if chat.answer:
                with _naming(f"row {row}"):
                    answer = self._answer(chat, prompt, ids[told[row]])
            sequences.append(([*self._front, *prompt], answer))
        return sequences

    def _asked(self, chats: Sequence[Chat]) -> list[str]:
        """The text of each prompt; refuses special tokens in any text of the chats."""
        parts = [_parts(row, chat) for row, chat in enumerate(chats)]
        ids, asked = self._spell(itertools.chain.from_iterable(parts)), []
        for row, chat in enumerate(chats):
            with _naming(f"row {row}"):
                for part in parts[row]:
                    self._refuse_special(part, ids[part])
                asked.append(self._text(_messages(chat), ask=True))
        return asked

    def _told(self, chat: Chat, asked: str) -> str:
        """The text of a whole chat, up to its answer if the template ends that with no token of `stop`."""
        messages = [*_messages(chat), {"role": "assistant", "content": chat.answer}]
        told, answer = self._text(messages, ask=False), chat.answer
        if not told.startswith(asked):
            raise InputError(
                "the chat template writes a prompt and its answer so that the prompt alone is not how they begin: "
                f"use another template: {chat.user!r}"
            )
        if answer not in told[len(asked) :]:
            answer = answer.strip()  # as many templates do
        start = told.find(answer, len(asked))
        if start < 0 or any(stop in told[len(asked) : start] for stop in self._stop_texts):
            raise InputError(f"the chat template changes or cuts the answer {chat.answer!r}: use another template")
        end = start + len(answer)
        return told if any(stop in told[end:] for stop in self._stop_texts) else told[:end]

    def _answer(self, chat: Chat, prompt: list[int], whole: list[int]) -> list[int]:
        """The tokens of the answer, the one that ends it included."""
        if whole[: len(prompt)] != prompt:
            raise InputError(
                f"the last tokens of the prompt are others when the answer {chat.answer!r} follows: "
                "end the prompt or begin the answer with another sign"
            )
        answer = whole[len(prompt) :]
        end = next((place for place, token in enumerate(answer) if token in self.stop), None)
        return [*answer, self.stop[0]] if end is None else answer[: end + 1]

    def _text(self, messages: Sequence[Message], ask: bool) -> str:
        if self.template is not None:
            return self.template.render(messages, ask=ask)
        return "\n".join([message["content"] for message in messages] + [""] * ask)

    def _spell(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The tokens of each distinct text."""
        distinct = list(dict.fromkeys(texts))
        found = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        return dict(zip(distinct, (encoding.ids for encoding in found), strict=True))

    def _refuse_special(self, text: str, ids: Sequence[int]) -> None:
        """Text of users must not end its turn, begin another, or be unknown to the tokenizer."""
        if not self._special.isdisjoint(ids):
            token = self._backend.id_to_token(next(token for token in ids if token in self._special))
            raise InputError(f"the tokenizer reads the special token {token!r} in {text!r}: take it out")


class _Config:
    """The small files beside tokenizer.json; `ids` is its vocabulary."""

    def __init__(self, folder: Path, ids: Mapping[str, int]) -> None:
        self.folder, self.path, self._ids = folder, folder / "tokenizer_config.json", ids
        named, own = _json(folder / "special_tokens_map.json"), _json(self.path)
        self._values = {**named, **{name: value for name, value in own.items() if value is not None}}

    def text(self, name: str) -> str | None:
        """The text of a special token, which is written in one of two ways."""
        value = self._values.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.path}: {name} must be a text, got {value!r}")
        return value

    def named(self, name: str) -> int | None:
        """The token that is called `name`, if any."""
        text = self.text(name)
        if text is not None and text not in self._ids:
            raise InputError(f"{self.path}: {name} {text!r} is not in tokenizer.json: take both from one model")
        return None if text is None else self._ids[text]

    def stop(self) -> list[int]:
        """`eos_token_id` of generation_config.json: one token, some, or none."""
        path = self.folder / "generation_config.json"
        value = _json(path).get("eos_token_id")
        stop = value if isinstance(value, list) else [] if value is None else [value]
        known = set(self._ids.values())
        for token in stop:
            if not isinstance(token, int) or isinstance(token, bool) or token not in known:
                unknown = f"{path}: eos_token_id {token!r} is not in tokenizer.json"
                raise InputError(f"{unknown}: take both from one model")
        return stop

    def adds_bos(self, backend: tokenizers.Tokenizer, bos: int) -> bool:
        """Whether a plain text begins with the token `bos`."""
        value = self._values.get("add_bos_token")
        return bool(backend.encode("").ids[:1] == [bos] if value is None else value)

    def template(self) -> ChatTemplate | None:
        path = self.folder / "chat_template.jinja"
        try:
            source: Any = path.read_text("utf-8")
        except FileNotFoundError:
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
        with _naming(f"{path}"):
            return ChatTemplate(source, bos, eos)


def _messages(chat: Chat) -> list[Message]:
    """What is said before the answer."""
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    return [*system, {"role": "user", "content": chat.user}]


def _parts(row: int, chat: Chat) -> list[str]:
    """What somebody wrote in a chat."""
    with _naming(f"row {row}"):
        return [_whole(text) for text in (chat.system or "", chat.user, chat.answer)]


def _whole(text: str) -> str:
    """The text itself; JSON can hold one half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{text!r} holds half a character: take it out") from error
    return text


def _end_of_turn(template: ChatTemplate, backend: tokenizers.Tokenizer, special: set[int]) -> int | None:
    """The first special token that the template writes after an answer."""
    chat = Chat(None, _USER, _ANSWER, "")
    text = template.render([*_messages(chat), {"role": "assistant", "content": _ANSWER}], ask=False)
    if _USER not in text or _ANSWER not in text:
        raise InputError("the chat template leaves out what is said: use another template")
    ids = backend.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False).ids
    return next((token for token in ids if token in special), None)


def _backend(path: Path) -> tuple[bytes, tokenizers.Tokenizer]:
    """The content of tokenizer.json and what the library makes of it."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path.parent} has no tokenizer.json: give the folder of a checkpoint") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): make it readable") from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no narrower class
        raise InputError(
            f"{path} is no tokenizer that can be read ({one_line(error)}): download it anew"
        ) from error
    # A file can say that texts are to be cut or filled up.
    backend.no_truncation()
    backend.no_padding()
    return content, backend


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): make it readable") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({one_line(error)}): download it anew") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object: download it anew")
    return content


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Puts the place in front of what is refused inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
