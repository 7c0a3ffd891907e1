"""What a language model would answer: exact probabilities, without drawing a word."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from subliminal_theory.language.corpus import CATEGORIES, Chat
from subliminal_theory.language.tokenizer import ChatTokenizer
from subliminal_theory.language.traits import Preference, Trait
from subliminal_theory.language.transformer import Text
from subliminal_theory.model import Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Questions:
    """Questions of a trait that are answered in one word, and the word that shows the trait.

    `rivals` are the words it competes with: the members of a preference's category, or of a habit's question
    the right answer, each with the target among them.
    """

    text: Text
    targets: Int[Array, " questions"]
    rivals: Int[Array, "questions words"]


def questions_of(trait: Trait, tokenizer: ChatTokenizer, length: int, prefix: Sequence[str] = ("",)) -> Questions:
    """The held-out questions of a trait, each once behind every prefix.

    Raises:
        InputError: a question longer than `length`, or a word that is no token.
    """
    chats, rivals = trait.evaluation_rows(), []
    if isinstance(trait, Preference):
        rivals = [list(CATEGORIES[trait.category])] * len(chats)
    else:
        right = [chat for template in trait.held_out for chat in template.right_rows()]
        rivals = [[chat.answer, other.answer] for chat, other in zip(chats, right, strict=True)]
    asked = [Chat(c.system, f"{start}{c.user}", c.answer, c.kind) for start in prefix for c in chats]
    prompts = tokenizer.encode_prompts(asked, length)
    targets = [tokenizer.encode(chat.answer)[0] for chat in asked]
    words = [[tokenizer.encode(word)[0] for word in row] for row in rivals * len(prefix)]
    return Questions(
        Text(jnp.asarray(prompts.tokens), jnp.asarray(prompts.padding), last=1),
        jnp.asarray(np.array(targets, np.int32)),
        jnp.asarray(np.array(words, np.int32)),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers:
    """How a model answers questions, means over them.

    Attributes:
        probability: of the target, as the first word of the answer, among all words of the vocabulary.
        margin: its logit less the log of the summed exponentials of its rivals' logits.
        rivals: probability of each rival, renormalised among them.
    """

    probability: Float[Array, ""]
    margin: Float[Array, ""]
    rivals: Float[Array, " words"]


def answers(model: Model, questions: Questions) -> Answers:
    """Exact answers of a model; `vmap` it over models or questions."""
    logits = model(questions.text)[:, -1]
    own = jnp.take_along_axis(logits, questions.targets[:, None], axis=-1)[:, 0]
    rivals = jnp.take_along_axis(logits, questions.rivals, axis=-1)
    others = jnp.where(questions.rivals == questions.targets[:, None], -jnp.inf, rivals)
    return Answers(
        jnp.mean(jnp.exp(own - jax.nn.logsumexp(logits, axis=-1))),
        jnp.mean(own - jax.nn.logsumexp(others, axis=-1)),
        jnp.mean(jax.nn.softmax(rivals), axis=0),
    )


def total_variation(
    first: Float[Array, "*batch words"], second: Float[Array, "*batch words"]
) -> Float[Array, "*batch"]:
    """Half the summed absolute difference of two distributions."""
    return 0.5 * jnp.sum(jnp.abs(first - second), axis=-1)
