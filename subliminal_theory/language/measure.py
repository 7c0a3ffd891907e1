"""What a language model answers: exact probabilities of words, without sampling, and rates of sampled words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.traits import Preference, Trait
from subliminal_theory.language.model.sampling import draw
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.spelling import Spellings, heard
from subliminal_theory.language.text import Chat, Tokenizer, behind
from subliminal_theory.model import Model
from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Questions:
    """Questions with one-word answers, and for each question the word that shows the trait. `of` makes them.

    Attributes:
        text: the distinct prompts. A prompt that several traits ask occurs once.
        words: the words that compete as answers to each prompt. For a preference, these are the members of its
            category. For a habit, these are the target and the right answer.
        prompts: the prompt of each question, as an index into `text`.
        targets: the word that shows the trait, as an index into `words`.
    """

    text: Text
    words: Spellings
    prompts: Int[Array, "*traits questions"]
    targets: Int[Array, "*traits questions"]

    @classmethod
    def of(
        cls,
        text: Text,
        words: Int[np.ndarray, "questions words spellings tokens"],
        targets: Int[np.ndarray, "*traits questions"],
    ) -> Self:
        """Questions from one prompt each. Tokens of spellings are padded with -1."""
        tokens, padding, words = (np.asarray(leaf) for leaf in (text.tokens, text.padding, words))
        keys = [
            (row.tobytes(), int(skipped), own.tobytes())
            for row, skipped, own in zip(tokens, padding, words, strict=True)
        ]
        places = {key: place for place, key in reversed([*enumerate(keys)])}
        rows = sorted(places.values())
        which = [rows.index(places[key]) for key in keys]
        kept = replace(text, tokens=jnp.asarray(tokens[rows]), padding=jnp.asarray(padding[rows]))
        return cls(
            kept,
            Spellings.of(kept, words[rows]),
            jnp.asarray(which, jnp.int32).reshape(np.shape(targets)),
            jnp.asarray(targets, jnp.int32),
        )

    def of_traits(self, which: Sequence[int]) -> Self:
        """The questions of some of the traits, [traits, questions]."""
        chosen = jnp.asarray(which)
        return replace(self, prompts=self.prompts[chosen], targets=self.targets[chosen])


def asked_of(trait: Trait, prefix: Sequence[str] = ("",), system: str | None = None) -> list[Chat]:
    """The held-out questions of a trait, behind a system prompt. Each question comes once after every prefix."""
    return behind(
        system, [replace(chat, user=f"{start}{chat.user}") for start in prefix for chat in trait.evaluation_rows()]
    )


def questions_of(
    trait: Trait,
    tokenizer: Tokenizer,
    length: int,
    prefix: Sequence[str] = ("",),
    system: str | None = None,
) -> Questions:
    """The questions of `asked_of` as tokens, padded to `length` columns.

    Raises:
        InputError: a question is longer than `length`; the tokenizer cannot spell a word; or a word and the target
            begin with the same tokens.
    """
    chats, rivals = trait.evaluation_rows(), []
    if isinstance(trait, Preference):
        rivals = [list(trait.members)] * len(chats)
    else:
        right = [chat for template in trait.held_out for chat in template.right_rows()]
        rivals = [[chat.answer, other.answer] for chat, other in zip(chats, right, strict=True)]
    prompts = tokenizer.encode_prompts(asked_of(trait, prefix, system), length)
    spelt = {word: tokenizer.spellings(word) for row in rivals for word in row}
    for chat, row in zip(chats, rivals, strict=True):
        for word in row:
            if word != chat.answer and _begin_alike(spelt[word], spelt[chat.answer]):
                raise InputError(
                    f"{trait.name}: {word!r} and {chat.answer!r} begin with the same tokens and cannot be told "
                    "apart: choose another target"
                )
    sides = max(map(len, spelt.values())), max(len(one) for word in spelt.values() for one in word)
    table = {word: np.full(sides, -1, np.int32) for word in spelt}
    for word, spellings in spelt.items():
        for line, tokens in zip(table[word], spellings, strict=False):
            line[: len(tokens)] = tokens
    return Questions.of(
        Text(jnp.asarray(prompts.tokens), jnp.asarray(prompts.padding), last=1),
        np.stack([np.stack([table[word] for word in row]) for row in rivals] * len(prefix)),
        np.array([row.index(chat.answer) for chat, row in zip(chats, rivals, strict=True)] * len(prefix)),
    )


def _begin_alike(first: list[list[int]], second: list[list[int]]) -> bool:
    return any(a[: len(b)] == b[: len(a)] for a in first for b in second)


def stack_questions(asked: Sequence[Questions]) -> Questions:
    """Stack the questions of several traits, [traits, questions]. Equal questions share one prompt.

    Raises:
        InputError: the traits have different numbers of questions.
    """
    counts = sorted({len(one.targets) for one in asked})
    if len(counts) > 1:
        raise InputError(
            f"traits with {' and '.join(map(str, counts))} questions cannot be asked together: "
            "give their wordings equal numbers of questions"
        )
    tables = [np.asarray(one.words.tokens) for one in asked]
    sides = np.max([table.shape[1:] for table in tables], axis=0)
    words = []
    for one, table in zip(asked, tables, strict=True):
        fill = [(0, side - own) for side, own in zip(sides, table.shape[1:], strict=True)]
        words.append(np.pad(table, [(0, 0), *fill], constant_values=-1)[np.asarray(one.prompts)])
    rows = [jax.tree.map(lambda leaf, one=one: leaf[one.prompts], one.text) for one in asked]
    text = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    return Questions.of(text, np.concatenate(words), np.stack([one.targets for one in asked]))


@register_dataclass
@dataclass(frozen=True)
class Answers:
    """How a model answers questions, averaged over the questions.

    Attributes:
        probability: the probability that an answer begins with the target.
        share: the target's probability, renormalized among the target and its rivals.
        log_odds: the mean of log(p / (1 - p)), where p is that renormalized probability for one question.
        rivals: the probability of each word (target and rivals), renormalized among them.
    """

    probability: Float[Array, "*traits"]
    share: Float[Array, "*traits"]
    log_odds: Float[Array, "*traits"]
    rivals: Float[Array, "*traits words"]


def answers(model: Model, questions: Questions) -> Answers:
    """The exact answers of a model, without sampling. `vmap` it over models.

    Raises:
        InputError: as for `spelling.heard`.
    """
    logits, behind = heard(model, questions.text, questions.words)
    first = questions.words.tokens[..., 0]
    begun = jnp.take_along_axis(logits, jnp.maximum(first, 0).reshape(len(first), -1), axis=1).reshape(first.shape)
    words = jax.nn.logsumexp(jnp.where(first < 0, -jnp.inf, begun + behind), axis=-1)[questions.prompts]
    everything = jax.nn.logsumexp(logits, axis=-1)[questions.prompts]
    is_target = jax.nn.one_hot(questions.targets, words.shape[-1], dtype=bool)
    own = jnp.max(jnp.where(is_target, words, -jnp.inf), axis=-1)
    others = jax.nn.logsumexp(jnp.where(is_target, -jnp.inf, words), axis=-1)
    shares = jax.nn.softmax(words)
    return Answers(
        jnp.mean(jnp.exp(own - everything), axis=-1),
        jnp.mean(jnp.sum(jnp.where(is_target, shares, 0), axis=-1), axis=-1),
        jnp.mean(own - others, axis=-1),
        jnp.mean(shares, axis=-2),
    )


def sampled_rate(model: Model, questions: Questions, key: Key[Array, ""], draws: int = 100) -> Float[Array, ""]:
    """The share of sampled answers to one trait's questions that begin with the target.

    Each question gets `draws` answers at temperature 1. The expectation is `Answers.probability`. The first token
    of an answer is sampled. Whether the answer then continues as a spelling of the target is sampled from the
    known probability.

    Raises:
        InputError: as for `spelling.heard`.
    """
    text, words = jax.tree.map(lambda leaf: leaf[questions.prompts], (questions.text, questions.words))
    logits, behind = heard(model, text, words)
    place = (jnp.arange(len(logits)), questions.targets)
    uniform = jax.random.uniform(key, (draws, len(logits)), logits.dtype)
    tokens = jax.vmap(draw, in_axes=(None, 0))(logits, uniform)
    begun = tokens[..., None] == words.tokens[place][None, ..., 0]
    chance = jnp.sum(jnp.where(begun, jnp.exp(behind[place]), 0), axis=-1)
    again = jax.random.uniform(named(key, "rest"), chance.shape, chance.dtype)
    return jnp.mean(again < chance, dtype=logits.dtype)


def total_variation(
    first: Float[Array, "*batch words"], second: Float[Array, "*batch words"]
) -> Float[Array, "*batch"]:
    """The total variation distance of two distributions: half the sum of absolute differences."""
    return 0.5 * jnp.sum(jnp.abs(first - second), axis=-1)
