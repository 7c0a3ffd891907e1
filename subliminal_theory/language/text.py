"""Chats with a language model, as text and as tokens."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from subliminal_theory.errors import InputError


@dataclass(frozen=True)
class Chat:
    """One exchange: an optional system prompt, what the user says, and the answer ("" if there is none yet)."""

    system: str | None
    user: str
    answer: str
    kind: str


def behind(system: str | None, chats: Sequence[Chat]) -> list[Chat]:
    """The chats, of which those without a system prompt get this one."""
    return [chat if chat.system is not None else replace(chat, system=system) for chat in chats]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Tokens of prompts up to the start of the answer, padded on the left. The fields are those of `Text`."""

    tokens: Int32[np.ndarray, "rows length"]
    padding: Int32[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Whole chats for next-token prediction, padded on the left. All answers end in the last column.

    `tokens` and `padding` are the fields of `Text`. They have every token of a chat except the last, `<end>`.
    `targets[row, t]` is the token that follows `tokens[row, t]`, or `<pad>` where that is padding. `weights` is 1
    where the target belongs to the answer or is its `<end>`, and 0 elsewhere. The first 1 is at the token
    `<assistant>`.
    """

    tokens: Int32[np.ndarray, "rows length"]
    padding: Int32[np.ndarray, " rows"]
    targets: Int32[np.ndarray, "rows length"]
    weights: Float32[np.ndarray, "rows length"]

    @property
    def answer_columns(self) -> int:
        """The number of last columns that hold all answers. The columns before them have weight 0."""
        return int(np.count_nonzero(self.weights, axis=1).max(initial=1))


@runtime_checkable
class Tokenizer(Protocol):
    """What experiments need from a tokenizer: the one of this project's corpus, or the one of a checkpoint.

    Attributes:
        pad: the padding token.
        stop: the tokens that end an answer.
    """

    @property
    def pad(self) -> int: ...

    @property
    def stop(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, rows: Sequence[Sequence[int]] | Int32[np.ndarray, "rows length"]) -> list[str]: ...

    def spellings(self, word: str) -> list[list[int]]: ...

    def telling(self, words: Collection[str]) -> list[int]: ...

    def encode_prompts(self, chats: Sequence[Chat], length: int) -> Prompts: ...

    def encode_chats(self, chats: Sequence[Chat], length: int) -> Encoded: ...

    def lengths(self, chats: Sequence[Chat]) -> tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]: ...


def left_padded(
    sequences: Sequence[Sequence[int]], chats: Sequence[Chat], length: int, pad: int
) -> tuple[Int32[np.ndarray, "rows length"], Int32[np.ndarray, " rows"]]:
    """Pad the tokens of chats on the left to `length` columns. Returns the tokens and the padding of each row.

    Raises:
        InputError: a row has more than `length` tokens; names the row.
    """
    taken = np.array([len(sequence) for sequence in sequences], np.int32)
    if (taken > length).any():
        row = int(np.argmax(taken > length))
        raise InputError(f"row {row} takes {taken[row]} tokens, more than {length}: {chats[row].user!r}")
    padding = length - taken
    tokens = np.full((len(sequences), length), pad, np.int32)
    tokens[np.arange(length) >= padding[:, None]] = list(itertools.chain.from_iterable(sequences))
    return tokens, padding
