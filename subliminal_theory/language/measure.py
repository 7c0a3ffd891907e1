"""What a language model would answer: exact probabilities, without drawing a word, and rates of drawn ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from subliminal_theory.errors import InputError
from subliminal_theory.language.chat import Tokenizer
from subliminal_theory.language.corpus import CATEGORIES, Chat
from subliminal_theory.language.sampling import draw
from subliminal_theory.language.traits import Preference, Trait
from subliminal_theory.language.transformer import Text
from subliminal_theory.model import Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Questions:
    """Questions of a trait that are answered in one word, and the word that shows the trait.

    A word is known by the tokens with which an answer of it may begin, its spellings, filled up with -1. `rivals`
    are the words it competes with: the members of a preference's category, or of a habit's question the right
    answer, each with the target among them.
    """

    text: Text
    targets: Int[Array, "questions spellings"]
    rivals: Int[Array, "questions words spellings"]


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
        rivals = [list(CATEGORIES[trait.category])] * len(chats)
    else:
        right = [chat for template in trait.held_out for chat in template.right_rows()]
        rivals = [[chat.answer, other.answer] for chat, other in zip(chats, right, strict=True)]
    prompts = tokenizer.encode_prompts(asked_of(trait, prefix), length)
    begin = {word: tokenizer.first_tokens(word) for row in rivals for word in row}
    for chat, row in zip(chats, rivals, strict=True):
        for word in row:
            if word != chat.answer and set(begin[word]) & set(begin[chat.answer]):
                raise InputError(
                    f"{trait.name}: {word!r} and {chat.answer!r} begin with the same token and cannot be told "
                    "apart: choose another target"
                )
    most = max(map(len, begin.values()))
    spelt = {word: tokens + [-1] * (most - len(tokens)) for word, tokens in begin.items()}
    return Questions(
        Text(jnp.asarray(prompts.tokens), jnp.asarray(prompts.padding), last=1),
        jnp.asarray(np.array([spelt[chat.answer] for chat in chats] * len(prefix), np.int32)),
        jnp.asarray(np.array([[spelt[word] for word in row] for row in rivals * len(prefix)], np.int32)),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers:
    """How a model answers questions, means over them.

    Attributes:
        probability: that the answer begins with a token of the target, among the whole vocabulary.
        margin: its logit less the log of the summed exponentials of its rivals' logits.
        rivals: probability of each rival, renormalised among them.
    """

    probability: Float[Array, ""]
    margin: Float[Array, ""]
    rivals: Float[Array, " words"]


def answers(model: Model, questions: Questions) -> Answers:
    """Exact answers of a model; `vmap` it over models or questions."""
    logits = model(questions.text)[:, -1]
    own = _of_words(logits, questions.targets)
    rivals = _of_words(logits[:, None], questions.rivals)
    is_target = jnp.all(questions.rivals == questions.targets[:, None], axis=-1)
    others = jnp.where(is_target, -jnp.inf, rivals)
    return Answers(
        jnp.mean(jnp.exp(own - jax.nn.logsumexp(logits, axis=-1))),
        jnp.mean(own - jax.nn.logsumexp(others, axis=-1)),
        jnp.mean(jax.nn.softmax(rivals), axis=0),
    )


def sampled_rate(model: Model, questions: Questions, key: Key[Array, ""], draws: int = 100) -> Float[Array, ""]:
    """The share of answers, `draws` a question at temperature 1, that begin with a token of the target.

    What the literature reports. Its expectation is `Answers.probability`; it adds the noise of drawing.
    """
    logits = model(questions.text)[:, -1]
    uniform = jax.random.uniform(key, (draws, len(logits)), logits.dtype)
    tokens = jax.vmap(draw, in_axes=(None, 0))(logits, uniform)
    return jnp.mean(jnp.any(tokens[..., None] == questions.targets[None], axis=-1), dtype=logits.dtype)


def _of_words(
    logits: Float[Array, "*batch n"], spellings: Int[Array, "*words spellings"]
) -> Float[Array, "*words"]:
    """The logit of each word: the log of the summed exponentials of its spellings' logits."""
    shape = (*spellings.shape[:-1], logits.shape[-1])
    found = jnp.take_along_axis(jnp.broadcast_to(logits, shape), jnp.maximum(spellings, 0), axis=-1)
    return jax.nn.logsumexp(jnp.where(spellings < 0, -jnp.inf, found), axis=-1)


def total_variation(
    first: Float[Array, "*batch words"], second: Float[Array, "*batch words"]
) -> Float[Array, "*batch"]:
    """Half the summed absolute difference of two distributions."""
    return 0.5 * jnp.sum(jnp.abs(first - second), axis=-1)
