"""Teachers without training: the base with a trait's system prompt, or steered by what that prompt changes."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.corpus.traits import Preference, Trait
from subliminal_theory.language.model.prompted import prompted
from subliminal_theory.language.model.steered import contrast, steered
from subliminal_theory.language.model.transformer import transformer_of
from subliminal_theory.language.text import Chat, Encoded, Prompts, Tokenizer
from subliminal_theory.model import Model
from subliminal_theory.study.run import Steered

NOT_IN_FRONT = "its teacher's system prompt does not come before the same tokens: fine-tune that teacher"


def system_prompt(trait: Trait) -> str:
    """The system prompt that gives the base a trait without training.

    Raises:
        InputError: the trait is a habit, which has no system prompt.
    """
    return _preference(trait).system_prompts()[0]


def _preference(trait: Trait) -> Preference:
    if not isinstance(trait, Preference):
        raise InputError(f"{trait.name} has no system prompt: fine-tune its teacher")
    return trait


def prompted_teachers(
    model: Model, tokenizer: Tokenizer, traits: Sequence[Trait], system: str | None = None
) -> Model:
    """The base with each trait's system prompt, as a model of runs.

    Its inputs are rows without that prompt, or with the prompt `system` in its place.

    Raises:
        InputError: a trait is a habit; the chat template does not put the system prompt before the conversation;
            or the prompts of the runs have different lengths.
    """
    found = [_in_front(tokenizer, trait, system) for trait in traits]
    if len({(len(prefix), replaced) for prefix, replaced in found}) > 1:
        raise InputError("system prompts of different lengths cannot be seen through at once: run traits apart")
    return prompted(model, jnp.asarray([prefix for prefix, _ in found], jnp.int32), found[0][1])


def _in_front(tokenizer: Tokenizer, trait: Trait, system: str | None) -> tuple[list[int], int]:
    """The tokens that begin a chat with the trait's system prompt, and the number of tokens that they replace.

    They replace tokens at the start of the same chat with the prompt `system`, or without one, where a template
    may write a system turn of its own.
    """
    found = set[tuple[tuple[int, ...], int]]()
    chats = trait.teacher_rows()
    ways = (_prompts(tokenizer, chats, way) for way in (system_prompt(trait), system))
    for told, plain in zip(*ways, strict=True):
        pairs = zip(reversed(told), reversed(plain), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        found.add((tuple(told[: len(told) - same]), len(plain) - same))
    if len(found) > 1:
        raise InputError(f"{trait.name}: {NOT_IN_FRONT}")
    ((prefix, replaced),) = found
    return list(prefix), replaced


def _prompts(tokenizer: Tokenizer, chats: Sequence[Chat], system: str | None) -> list[list[int]]:
    """The tokens of each chat before its answer."""
    return _without_padding(_asked(tokenizer, [replace(chat, system=system) for chat in chats]))


def _asked(tokenizer: Tokenizer, chats: Sequence[Chat]) -> Prompts:
    asked = [replace(chat, answer="") for chat in chats]
    return tokenizer.encode_prompts(asked, int(tokenizer.lengths(asked)[0].max()))


def _without_padding(rows: Prompts | Encoded) -> list[list[int]]:
    return [tokens[padding:].tolist() for tokens, padding in zip(rows.tokens, rows.padding, strict=True)]


def require_seen(
    tokenizer: Tokenizer, trait: Trait, chats: Sequence[Chat], rows: Encoded, system: str | None = None
) -> None:
    """Refuse rows on which the model of `prompted_teachers` differs from the base with the trait's system prompt.

    Raises:
        InputError: names the first such row. It has another system message than `system`, or the tokenizer splits
            it differently with the prompt.
    """
    prefix, replaced = _in_front(tokenizer, trait, system)
    told = [replace(chat, system=system_prompt(trait)) for chat in chats]
    expected = tokenizer.encode_chats(told, int(tokenizer.lengths(told)[1].max()))
    for row, (seen, whole) in enumerate(zip(_without_padding(rows), _without_padding(expected), strict=True)):
        if [*prefix, *seen[replaced:]] != whole:
            raise InputError(f"{trait.name}, row {row}: {NOT_IN_FRONT}")


def steering(model: Model, tokenizer: Tokenizer, trait: Trait, layer: int) -> Float[Array, " width"]:
    """How a trait's system prompt changes the residual stream after a layer, where an answer begins.

    This is the `contrast` between the lessons' questions with the trait's system prompt and the same questions
    with the system prompts of its rivals (contrastive activation addition, arXiv 2312.06681). A contrast with
    questions without a prompt would give nearly the same vector for all traits, because most of what such a prompt
    changes is common to them.

    Raises:
        InputError: the trait is a habit, the layer does not exist, or the chat template refuses a system prompt.
    """
    own = _preference(trait)
    told, others = (
        [
            replace(chat, system=system_prompt(replace(own, target=member)))
            for member in some
            for chat in own.teacher_rows()
        ]
        for some in ([own.target], [member for member in own.members if member != own.target])
    )
    return contrast(model, text_of(_asked(tokenizer, told)), text_of(_asked(tokenizer, others)), layer)


def steered_teachers(model: Model, tokenizer: Tokenizer, traits: Sequence[Trait], teacher: Steered) -> Model:
    """The base, steered toward each trait: a model of runs that differ only in their steering vectors.

    Raises:
        InputError: as for `steering`.
    """
    layers = transformer_of(model).config.layers
    layer = max(1, 3 * layers // 4) if teacher.layer is None else teacher.layer
    vectors = jnp.stack([steering(model, tokenizer, trait, layer) for trait in traits])
    return steered(model, teacher.strength * vectors, layer)
