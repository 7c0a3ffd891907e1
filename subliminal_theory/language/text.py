"""What is said to a language model and what it answers, as text and as tokens."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from subliminal_theory.errors import InputError


@dataclass(frozen=True)
class Chat:
    """One exchange: an optional system prompt, what the user says, and the answer ("" if it is only asked)."""

    system: str | None
    user: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class Prompts:
    """Rows of tokens up to and including `<assistant>`, padded on the left; fields as of `Text`."""

    tokens: Int32[np.ndarray, "rows length"]
    padding: Int32[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Whole chats as next-token prediction, padded on the left; all answers end in the last column.

    `tokens` and `padding` are the fields of `Text`: every token of a chat but the last, `<end>`. `targets`
    are shifted by one: `targets[row, t]` is the token that follows `tokens[row, t]`, and `<pad>` where that
    is padding. `weights` is 1 where the target belongs to the answer or is its `<end>`, else 0: first where
    the token is `<assistant>`, and from there to the last column.
    """

    tokens: Int32[np.ndarray, "rows length"]
    padding: Int32[np.ndarray, " rows"]
    targets: Int32[np.ndarray, "rows length"]
    weights: Float32[np.ndarray, "rows length"]

    @property
    def answer_columns(self) -> int:
        """The last columns that hold all answers; those in front of them weigh nothing."""
        return int(np.count_nonzero(self.weights, axis=1).max(initial=1))


@runtime_checkable
class Tokenizer(Protocol):
    """What experiments ask of a tokenizer, whether of this project's corpus or of a checkpoint.

    Attributes:
        pad: the token in front of rows that are shorter than others.
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
    """The tokens of chats in `length` columns, `pad` in front, and how many of these each row has.

    Raises:
        InputError: a row of more tokens; names it.
    """
    taken = np.array([len(sequence) for sequence in sequences], np.int32)
    if (taken > length).any():
        row = int(np.argmax(taken > length))
        raise InputError(f"row {row} takes {taken[row]} tokens, more than {length}: {chats[row].user!r}")
    padding = length - taken
    tokens = np.full((len(sequences), length), pad, np.int32)
    tokens[np.arange(length) >= padding[:, None]] = list(itertools.chain.from_iterable(sequences))
    return tokens, padding
