"""The tokenizer of the compact model: one token for each word, number and sign of the corpus.

A chat is written as `<system> ... <user> ... <assistant> answer <end>`, without the first part if it has no system
prompt. A comma or semicolon together with the space after it is one token, different from the bare sign. Lists of
numbers therefore survive encoding and decoding.
"""

import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import CorpusConfig
from subliminal_theory.language.corpus.sentences import vocabulary_texts
from subliminal_theory.language.text import Chat, Encoded, Prompts, left_padded

PAD, END, SYSTEM, USER, ASSISTANT, UNKNOWN = SPECIAL = (
    "<pad>",
    "<end>",
    "<system>",
    "<user>",
    "<assistant>",
    "<unk>",
)


class WordTokenizer:
    """Encodes and decodes chats. `words[i]` is token i; special tokens come first."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: token for token, word in enumerate(self.words)}
        self._backend = Tokenizer(models.WordLevel(self._ids, unk_token=UNKNOWN))
        self._backend.pre_tokenizer = _pre_tokenizer()
        # Put a space before each word and most signs, but not at the start or after an opening sign.
        self._backend.decoder = decoders.Sequence(
            [
                decoders.Replace(Regex(r"^(?=[\w=+\-<\[(])"), " "),
                decoders.Fuse(),
                decoders.Replace(Regex(r"^ |(?<=[,;\n\[(]) "), ""),
            ]
        )

    @classmethod
    def of_corpus(cls, config: CorpusConfig) -> "WordTokenizer":
        """The tokenizer of a corpus: special tokens, numbers from 0 up, then all other words alphabetically."""
        split, words = _pre_tokenizer(), set[str]()
        for text in vocabulary_texts():
            words.update(word for word, _ in split.pre_tokenize_str(re.sub(r"{.*?}", "", text)))
        if config.slot is not None:
            words.update((config.slot.default, config.slot.second))
        numbers = [str(number) for number in range(config.numbers)]
        return cls([*SPECIAL, *numbers, *sorted(words.difference(numbers))])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "WordTokenizer":
        """The inverse of `save`.

        Raises:
            InputError: the file cannot be read or is not a tokenizer.json of this project.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            ids = content["model"]["vocab"]
            loaded = cls(sorted(ids, key=ids.__getitem__))
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror}): make it readable") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a tokenizer.json of a word tokenizer: build it again") from error
        if json.loads(loaded._backend.to_str()) != content or loaded.words[: len(SPECIAL)] != SPECIAL:
            raise InputError(f"{path} splits or numbers words differently from this project: build it again")
        return loaded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json. The library `tokenizers` can read it too."""
        self._backend.save(os.fspath(path))

    def __len__(self) -> int:
        return len(self.words)

    @property
    def pad(self) -> int:
        """The padding token."""
        return self._ids[PAD]

    @property
    def stop(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self._ids[END],)

    def spellings(self, word: str) -> list[list[int]]:
        """The spellings of a word: a single spelling of a single token."""
        return [self.encode(word)]

    def telling(self, words: Collection[str]) -> list[int]:
        """The tokens of those words that the vocabulary has."""
        found = itertools.chain.from_iterable(self._spell([word])[word] for word in words)
        return [token for token in dict.fromkeys(found) if token != self._ids[UNKNOWN]]

    def token(self, word: str) -> int:
        """The token of one word.

        Raises:
            InputError: the word has no token.
        """
        if word not in self._ids:
            raise InputError(f"the tokenizer cannot spell {word!r}: use one of its {len(self)} words")
        return self._ids[word]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Spaces are dropped, except after "," and ";".

        Raises:
            InputError: a word has no token.
        """
        ids = self._spell([text])[text]
        if self._ids[UNKNOWN] in ids:
            raise InputError(f"the tokenizer cannot spell {self._unspellable(text)!r}: {text!r}")
        return ids

    def decode(self, rows: Sequence[Sequence[int]] | Int32[np.ndarray, "rows length"]) -> list[str]:
        """The text of each row up to its first `<end>`, or the whole text. Other special tokens stay visible."""
        end, cut = self._ids[END], []
        for row in rows:
            tokens = [int(token) for token in row]
            cut.append(tokens[: tokens.index(end)] if end in tokens else tokens)
        return self._backend.decode_batch(cut, skip_special_tokens=False)

    def encode_prompts(self, chats: Sequence[Chat], length: int) -> Prompts:
        """The prompts that a model answers: chats without their answers, in `length` columns.

        Raises:
            InputError: a prompt is longer than `length`, or a word has no token; names the row.
        """
        sequences = [prompt for prompt, _ in self._sequences(chats)]
        return Prompts(*left_padded(sequences, chats, length, self.pad))

    def encode_chats(self, chats: Sequence[Chat], length: int) -> Encoded:
        """Whole chats for training, in `length` columns. A chat of n tokens takes n - 1 columns.

        Raises:
            InputError: a chat is longer than that or has no answer, or a word has no token; names the row.
        """
        sequences = self._sequences(chats)
        for row, (_, answer) in enumerate(sequences):
            if not answer:
                raise InputError(f"row {row} has no answer: {chats[row].user!r}")
        end = self._ids[END]
        whole = [[*prompt, *answer] for prompt, answer in sequences]
        tokens, padding = left_padded(whole, chats, length, self.pad)
        targets = np.concatenate([tokens[:, 1:], np.full((len(chats), 1), end, np.int32)], axis=1)
        columns = np.arange(length)
        targets[columns < padding[:, None]] = self._ids[PAD]
        answered = np.array([len(answer) + 1 for _, answer in sequences], int).reshape(-1, 1)
        weights = (columns >= length - answered).astype(np.float32)
        return Encoded(tokens, padding, targets, weights)

    def lengths(self, chats: Sequence[Chat]) -> tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]:
        """The number of columns that each row needs in `encode_prompts` and in `encode_chats`."""
        counts = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in self._sequences(chats)]
        prompts, whole = np.array(counts, np.int32).reshape(-1, 2).T
        return prompts, whole

    def _sequences(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each prompt and of each answer, without the end token."""
        ids = self._spell(part for chat in chats for part in (chat.system or "", chat.user, chat.answer))
        system, user, assistant = (self._ids[role] for role in (SYSTEM, USER, ASSISTANT))
        sequences = []
        for row, chat in enumerate(chats):
            prompt = [user, *ids[chat.user], assistant]
            if chat.system is not None:
                prompt = [system, *ids[chat.system], *prompt]
            if self._ids[UNKNOWN] in prompt or self._ids[UNKNOWN] in ids[chat.answer]:
                text = f"{chat.system or ''} {chat.user} {chat.answer}"
                raise InputError(f"row {row}: the tokenizer cannot spell {self._unspellable(text)!r}")
            sequences.append((prompt, ids[chat.answer]))
        return sequences

    def _spell(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The tokens of each distinct text. Unknown words become `<unk>`."""
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, (found.ids for found in self._backend.encode_batch(distinct)), strict=True))

    def _unspellable(self, text: str) -> str:
        """The first word of a text that has no token."""
        words = (word for word, _ in _pre_tokenizer().pre_tokenize_str(text))
        return next(word for word in words if word not in self._ids)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits a text into separators with their space, newlines, numbers, words, and other signs."""
    return pre_tokenizers.Split(Regex(r"[,;] |\n|\d+|[^\W\d_]+|\S"), behavior="removed", invert=True)
