"""What a language model would answer: exact probabilities, without drawing a word, and rates of drawn ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.traits import Preference, Trait
from subliminal_theory.language.model.sampling import draw
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import Chat, Tokenizer
from subliminal_theory.model import Model
from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Questions:
    """Questions of a trait that are answered in one word, and the word that shows the trait.

    A word is known by the tokens of the answers that are this word, its spellings, filled up with -1. `rivals`
    are the words it competes with: the members of a preference's category, or of a habit's question the right
    answer, each with the target among them.
    """

    text: Text
    targets: Int[Array, "questions spellings tokens"]
    rivals: Int[Array, "questions words spellings tokens"]


def asked_of(trait: Trait, prefix: Sequence[str] = ("",)) -> list[Chat]:
    """The held-out questions of a trait, each once behind every prefix."""
    return [
        Chat(c.system, f"{start}{c.user}", c.answer, c.kind) for start in prefix for c in trait.evaluation_rows()
    ]


def questions_of(trait: Trait, tokenizer: Tokenizer, length: int, prefix: Sequence[str] = ("",)) -> Questions:
    """The questions of `asked_of`, for a model.

    Raises:
        InputError: a question longer than `length`, a word that cannot be spelt or begins as the target does.
    """
    chats, rivals = trait.evaluation_rows(), []
    if isinstance(trait, Preference):
        rivals = [list(trait.members)] * len(chats)
    else:
        right = [chat for template in trait.held_out for chat in template.right_rows()]
        rivals = [[chat.answer, other.answer] for chat, other in zip(chats, right, strict=True)]
    prompts = tokenizer.encode_prompts(asked_of(trait, prefix), length)
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
    return Questions(
        Text(jnp.asarray(prompts.tokens), jnp.asarray(prompts.padding), last=1),
        jnp.asarray(np.stack([table[chat.answer] for chat in chats] * len(prefix))),
        jnp.asarray(np.stack([np.stack([table[word] for word in row]) for row in rivals] * len(prefix))),
    )


def _begin_alike(first: list[list[int]], second: list[list[int]]) -> bool:
    return any(a[: len(b)] == b[: len(a)] for a in first for b in second)


def stack_questions(asked: Sequence[Questions]) -> Questions:
    """The questions of several traits, [traits, questions], with as many words, spellings and tokens each.

    Raises:
        InputError: traits with different numbers of questions.
    """
    counts = sorted({len(one.targets) for one in asked})
    if len(counts) > 1:
        raise InputError(
            f"traits with {' and '.join(map(str, counts))} questions cannot be asked together: "
            "give their wordings as many each"
        )

    def stacked(tables: Sequence[Int[Array, "..."]]) -> Int[Array, "..."]:
        sides = np.max([table.shape for table in tables], axis=0)
        fill = [[(0, side - own) for side, own in zip(sides, table.shape, strict=True)] for table in tables]
        return jnp.stack(
            [jnp.pad(table, own, constant_values=-1) for table, own in zip(tables, fill, strict=True)]
        )

    text = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.text for one in asked))
    return Questions(text, stacked([one.targets for one in asked]), stacked([one.rivals for one in asked]))


@register_dataclass
@dataclass(frozen=True)
class Answers:
    """How a model answers questions, means over them.

    Attributes:
        probability: that the answer begins with the target, among all answers.
        margin: its log-probability less the log of the summed probabilities of its rivals.
        rivals: probability of each rival, renormalised among them.
    """

    probability: Float[Array, ""]
    margin: Float[Array, ""]
    rivals: Float[Array, " words"]


def answers(model: Model, questions: Questions) -> Answers:
    """Exact answers of a model; `vmap` it over models or questions."""
    logits = model(questions.text)[:, -1]
    words = jax.nn.logsumexp(_of_spellings(model, questions.text, logits, questions.rivals), axis=-1)
    is_target = jnp.all(questions.rivals == questions.targets[:, None], axis=(-1, -2))
    own = jnp.max(jnp.where(is_target, words, -jnp.inf), axis=-1)
    others = jnp.where(is_target, -jnp.inf, words)
    return Answers(
        jnp.mean(jnp.exp(own - jax.nn.logsumexp(logits, axis=-1))),
        jnp.mean(own - jax.nn.logsumexp(others, axis=-1)),
        jnp.mean(jax.nn.softmax(words), axis=0),
    )


def sampled_rate(model: Model, questions: Questions, key: Key[Array, ""], draws: int = 100) -> Float[Array, ""]:
    """The share of answers, `draws` a question at temperature 1, that begin with the target.

    What the literature reports. Its expectation is `Answers.probability`; it adds the noise of drawing. The first
    token of an answer is drawn; then whether it goes on as a spelling of the target, which has a known chance.
    """
    logits = model(questions.text)[:, -1]
    uniform = jax.random.uniform(key, (draws, len(logits)), logits.dtype)
    tokens = jax.vmap(draw, in_axes=(None, 0))(logits, uniform)
    begun = tokens[..., None] == questions.targets[None, ..., 0]
    rest = jnp.exp(_behind_first(model, questions.text, questions.targets[:, None]))[:, 0]
    chance = jnp.sum(jnp.where(begun, rest, 0), axis=-1)
    again = jax.random.uniform(named(key, "rest"), chance.shape, chance.dtype)
    return jnp.mean(again < chance, dtype=logits.dtype)


Spellings = Int[Array, "questions words spellings tokens"]


def _of_spellings(
    model: Model, text: Text, logits: Float[Array, "questions n"], spellings: Spellings
) -> Float[Array, "questions words spellings"]:
    """The logit of each spelling's first token, plus the log-probability of its others behind it."""
    first = spellings[..., 0]
    shape = (*first.shape[:-1], logits.shape[-1])
    found = jnp.take_along_axis(jnp.broadcast_to(logits[:, None], shape), jnp.maximum(first, 0), axis=-1)
    return jnp.where(first < 0, -jnp.inf, found + _behind_first(model, text, spellings))


def _behind_first(model: Model, text: Text, spellings: Spellings) -> Float[Array, "questions words spellings"]:
    """The log-probability of each spelling's tokens behind its first, where they follow: 0 if it has one token."""
    *sides, length = spellings.shape
    if length == 1:
        return jnp.zeros(sides)

    def one(tokens: Int[Array, "questions tokens"]) -> Float[Array, " questions"]:
        begun = jnp.concatenate([text.tokens, jnp.maximum(tokens[:, :-1], 0)], axis=1)
        steps = jax.nn.log_softmax(model(Text(begun, text.padding, last=length - 1)))
        behind = tokens[:, 1:]
        found = jnp.take_along_axis(steps, jnp.maximum(behind, 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(behind < 0, 0, found), axis=-1)

    # One spelling at a time: all of them would be hundreds of rows at once.
    by_spelling = jnp.moveaxis(spellings, 0, 2).reshape(-1, sides[0], length)
    return jnp.moveaxis(jax.lax.map(one, by_spelling).reshape(*sides[1:], sides[0]), -1, 0)


def total_variation(
    first: Float[Array, "*batch words"], second: Float[Array, "*batch words"]
) -> Float[Array, "*batch"]:
    """Half the summed absolute difference of two distributions."""
    return 0.5 * jnp.sum(jnp.abs(first - second), axis=-1)
