"""The tokenizer of a checkpoint, with the interface of `WordTokenizer`.

The folder of a checkpoint has tokenizer.json and tokenizer_config.json. It may have chat_template.jinja,
special_tokens_map.json and generation_config.json. The chat template writes a chat as one text with the names of
special tokens. The backend splits this text into tokens and adds no others.
"""

import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32

from subliminal_theory.errors import InputError, shown
from subliminal_theory.files import fingerprint
from subliminal_theory.language.hub.chat_template import ChatTemplate
from subliminal_theory.language.hub.chat_writer import ChatWriter, naming
from subliminal_theory.language.hub.gguf_file import is_gguf
from subliminal_theory.language.hub.gguf_tokenizer import text_files
from subliminal_theory.language.hub.tokenizer_files import TokenizerFiles, end_of_turn, load_backend
from subliminal_theory.language.text import Chat, Encoded, Prompts, left_padded


@dataclass(frozen=True, eq=False)
class CheckpointTokenizer:
    """Encodes and decodes chats in the format of a checkpoint. Use `load` to make one.

    A user's text never becomes a special token: a chat that contains the name of a special token is refused.

    Attributes:
        backend: splits a text into tokens.
        writer: writes chats as text.
        special: the tokens that users cannot write.
        stop: the tokens that end an answer: `eos_token`, `eos_token_id` of generation_config.json, and the first
            special token that the chat template writes after an answer.
        pad: the token for left padding: `pad_token`, or the first of `stop` if there is none.
        front: the token before every chat: `bos_token` if chats have no template and the checkpoint begins texts
            with it (`add_bos_token`, or tokenizer.json if that is not set). Otherwise empty.
        fingerprint: the fingerprint of tokenizer.json and of the template's source.
    """

    backend: tokenizers.Tokenizer
    writer: ChatWriter
    special: frozenset[int]
    stop: tuple[int, ...]
    pad: int
    front: tuple[int, ...]
    fingerprint: str

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "CheckpointTokenizer":
        """The tokenizer in a checkpoint's folder or GGUF file.

        Raises:
            InputError: there is no tokenizer.json; a file cannot be read or is malformed; a named token is not in
                the vocabulary; no token ends an answer; the template refuses a plain chat.
        """
        folder = Path(folder)
        backend = load_backend(folder / "tokenizer.json")
        files = TokenizerFiles(folder, backend.get_vocab())
        template = files.template()
        bos, eos, pad = (files.token(f"{name}_token") for name in ("bos", "eos", "pad"))
        special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        special |= {token for token in (bos, eos, pad) if token is not None}
        ends = [eos, *files.stop()]
        if template is not None:
            with naming(f"{folder}"):
                ends.append(end_of_turn(template, backend, special))
        stop = tuple(dict.fromkeys(token for token in ends if token is not None))
        if not stop:
            raise InputError(f"{folder} names no token that ends a text: add eos_token to tokenizer_config.json")
        pad = stop[0] if pad is None else pad
        front = (bos,) if template is None and bos is not None and files.adds_bos(backend, bos) else ()
        writer = ChatWriter(template, backend.decode_batch([[token] for token in stop], skip_special_tokens=False))
        content = text_files(folder)["tokenizer.json"] if is_gguf(folder) else folder / "tokenizer.json"
        decided = fingerprint(content, template and template.source)
        return cls(backend, writer, frozenset(special | {pad, *stop}), stop, pad, front, decided)

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template; None for the plain form."""
        return self.writer.template

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def check_fits(self, vocabulary: int) -> None:
        """Refuse a model whose embedding has too few rows for the tokens. More rows are fine.

        Raises:
            InputError: a token has no row.
        """
        if max(self.backend.get_vocab().values()) >= vocabulary:
            sizes = f"the tokenizer has {len(self)} tokens, the embedding {vocabulary} rows"
            raise InputError(f"{sizes}: they are of different models")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with no tokens added before or after.

        Raises:
            InputError: the text contains a special token, or half of a surrogate pair.
        """
        ids = self._tokens_of([_valid(text)])[text]
        self._refuse_special(text, ids)
        return ids

    def decode(self, rows: Sequence[Sequence[int]] | Int32[np.ndarray, "rows length"]) -> list[str]:
        """The text of each row before its first token in `stop`, without special tokens."""
        cut = []
        for row in rows:
            answer = itertools.takewhile(lambda token: token not in self.stop, map(int, row))
            cut.append([token for token in answer if token not in self.special])
        return self.backend.decode_batch(cut, skip_special_tokens=False)

    def spellings(self, word: str) -> list[list[int]]:
        """The tokens of an answer that is this word: as given, with a capital first letter, and in lower case."""
        cases = dict.fromkeys((word, word[:1].upper() + word[1:], word.lower()))
        chats = [Chat(None, "?", spelt, "") for spelt in cases]
        answers = [itertools.takewhile(lambda t: t not in self.stop, own) for _, own in self._sequences(chats)]
        return [list(tokens) for tokens in dict.fromkeys(map(tuple, answers))]

    def telling(self, words: Collection[str]) -> list[int]:
        """All tokens that reveal one of the words: the word itself, and every part of its spellings.

        The word itself counts in any case, with any white space around it. The spellings are those of an answer
        and of running text: with and without a space before it, as given, in lower case, in upper case and in
        title case. Parts without a letter, such as a space, do not count.
        """
        texts = self.backend.decode_batch([[token] for token in range(len(self))], skip_special_tokens=False)
        whole = {word.lower() for word in words}
        found = {token for token, text in enumerate(texts) if text.strip().lower() in whole}
        for word in words:
            cases = dict.fromkeys((word, word.lower(), word.upper(), word.title()))
            spelt = [f"{space}{case}" for space in ("", " ") for case in cases]
            parts = itertools.chain(self._tokens_of(spelt).values(), self.spellings(word))
            found.update(token for tokens in parts for token in tokens if any(map(str.isalpha, texts[token])))
        return sorted(found - self.special)

    def encode_prompts(self, chats: Sequence[Chat], length: int) -> Prompts:
        """The chats without their answers, [chats, length], for a model to answer.

        Raises:
            InputError: a prompt is longer than `length`, the template refuses a chat, or a text contains a special
                token; the message names the row.
        """
        prompts = self._prompts(chats)
        ids = self._tokens_of(prompts)
        return Prompts(*left_padded([[*self.front, *ids[text]] for text in prompts], chats, length, self.pad))

    def encode_chats(self, chats: Sequence[Chat], length: int) -> Encoded:
        """Chats for training, [chats, length]. A chat of n tokens takes n - 1 columns.

        The answer consists of the tokens after the prompt, up to and including the first in `stop`. Later tokens
        are dropped. If the template writes no token in `stop`, the first of `stop` is added.

        Raises:
            InputError: as `encode_prompts`; a chat takes more than `length` columns, has no answer, or does not
                begin with its prompt; the message names the row.
        """
        sequences = self._sequences(chats)
        for row, (_, answer) in enumerate(sequences):
            if not answer:
                raise InputError(f"row {row} has no answer: {shown(chats[row].user)}")
        whole = [[*prompt, *answer] for prompt, answer in sequences]
        tokens, padding = left_padded([ids[:-1] for ids in whole], chats, length, self.pad)
        targets, _ = left_padded([ids[1:] for ids in whole], chats, length, self.pad)
        answered = np.array([len(answer) for _, answer in sequences], int).reshape(-1, 1)
        weights = (np.arange(length) >= length - answered).astype(np.float32)
        return Encoded(tokens, padding, targets, weights)

    def lengths(self, chats: Sequence[Chat]) -> tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]:
        """The number of columns that each chat takes in `encode_prompts` and in `encode_chats`.

        A chat without an answer is as long as its prompt.

        Raises:
            InputError: the template refuses a chat, a text contains a special token, or a chat does not begin with
                its prompt; the message names the row.
        """
        sequences = self._sequences(chats)
        counts = [(len(prompt), len(prompt) + max(len(answer) - 1, 0)) for prompt, answer in sequences]
        prompts, whole = np.array(counts, np.int32).reshape(-1, 2).T
        return prompts, whole

    def _sequences(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each prompt, and of each answer with the token that ends it (none for an empty answer)."""
        prompts, texts = self._prompts(chats), []
        for row, chat in enumerate(chats):
            with naming(f"row {row}"):
                texts.append(self.writer.whole(chat, prompts[row]) if chat.answer else "")
        ids, sequences = self._tokens_of([*prompts, *texts]), []
        for row, chat in enumerate(chats):
            prompt, answer = ids[prompts[row]], list[int]()
            if chat.answer:
                with naming(f"row {row}"):
                    answer = self._answer(chat, prompt, ids[texts[row]])
            sequences.append(([*self.front, *prompt], answer))
        return sequences

    def _prompts(self, chats: Sequence[Chat]) -> list[str]:
        """The text of each prompt. Refuses special tokens in the texts of the chats."""
        written = []
        for row, chat in enumerate(chats):
            with naming(f"row {row}"):
                written.append([_valid(text) for text in (chat.system or "", chat.user, chat.answer)])
        ids, prompts = self._tokens_of(itertools.chain.from_iterable(written)), []
        for row, chat in enumerate(chats):
            with naming(f"row {row}"):
                for text in written[row]:
                    self._refuse_special(text, ids[text])
                prompts.append(self.writer.prompt(chat))
        return prompts

    def _answer(self, chat: Chat, prompt: list[int], whole: list[int]) -> list[int]:
        """The tokens of the answer, with the token that ends it."""
        if whole[: len(prompt)] != prompt:
            raise InputError(
                f"the last tokens of the prompt change when the answer {shown(chat.answer)} follows: "
                "end the prompt or begin the answer with another character"
            )
        answer = whole[len(prompt) :]
        end = next((place for place, token in enumerate(answer) if token in self.stop), None)
        return [*answer, self.stop[0]] if end is None else answer[: end + 1]

    def _tokens_of(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The tokens of each distinct text."""
        distinct = list(dict.fromkeys(texts))
        found = self.backend.encode_batch_fast(distinct, add_special_tokens=False)
        return dict(zip(distinct, (encoding.ids for encoding in found), strict=True))

    def _refuse_special(self, text: str, ids: Sequence[int]) -> None:
        """Refuse special tokens: a user's text must not end its turn, begin another, or be unknown."""
        if not self.special.isdisjoint(ids):
            token = self.backend.id_to_token(next(token for token in ids if token in self.special))
            raise InputError(f"the tokenizer reads the special token {shown(token)} in {shown(text)}: take it out")


def _valid(text: str) -> str:
    """The text itself. Refuses half of a surrogate pair, which JSON allows but which is not valid text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{shown(text)} holds half a character: take it out") from error
    return text
