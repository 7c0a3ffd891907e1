"""Teachers that are the base itself: behind a trait's system prompt, or steered by what that prompt changes."""

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

NOT_IN_FRONT = "its teacher's system prompt does not stand in front of the same tokens: fine-tune that teacher"


def system_prompt(trait: Trait) -> str:
    """What makes a teacher of the base without training.

    Raises:
        InputError: the trait is a habit.
    """
    return _preference(trait).system_prompts()[0]


def _preference(trait: Trait) -> Preference:
    if not isinstance(trait, Preference):
        raise InputError(f"{trait.name} has no system prompt: fine-tune its teacher")
    return trait


def prompted_teachers(model: Model, tokenizer: Tokenizer, traits: Sequence[Trait]) -> Model:
    """The base behind each trait's system prompt, as functions of rows that have none: a model of runs.

    Raises:
        InputError: a habit; a chat template that has no place for a system prompt in front of what is said; or
            runs whose prompts are of different lengths.
    """
    found = [_in_front(tokenizer, trait) for trait in traits]
    if len({(len(prefix), replaced) for prefix, replaced in found}) > 1:
        raise InputError("system prompts of different lengths cannot be seen through at once: run traits apart")
    return prompted(model, jnp.asarray([prefix for prefix, _ in found], jnp.int32), found[0][1])


def _in_front(tokenizer: Tokenizer, trait: Trait) -> tuple[list[int], int]:
    """The tokens that begin a chat with the trait's system prompt, and how many of one without it they replace.

    Without one, a template may write a system turn of its own.
    """
    found = set[tuple[tuple[int, ...], int]]()
    chats = trait.teacher_rows()
    ways = (_prompts(tokenizer, chats, system) for system in (system_prompt(trait), None))
    for told, plain in zip(*ways, strict=True):
        pairs = zip(reversed(told), reversed(plain), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        found.add((tuple(told[: len(told) - same]), len(plain) - same))
    if len(found) > 1:
        raise InputError(f"{trait.name}: {NOT_IN_FRONT}")
    ((prefix, replaced),) = found
    return list(prefix), replaced


def _prompts(tokenizer: Tokenizer, chats: Sequence[Chat], system: str | None) -> list[list[int]]:
    """The tokens of each chat up to where its answer begins."""
    return _without_padding(_asked(tokenizer, [replace(chat, system=system) for chat in chats]))


def _asked(tokenizer: Tokenizer, chats: Sequence[Chat]) -> Prompts:
    asked = [replace(chat, answer="") for chat in chats]
    return tokenizer.encode_prompts(asked, int(tokenizer.lengths(asked)[0].max()))


def _without_padding(rows: Prompts | Encoded) -> list[list[int]]:
    return [tokens[padding:].tolist() for tokens, padding in zip(rows.tokens, rows.padding, strict=True)]


def require_seen(tokenizer: Tokenizer, trait: Trait, chats: Sequence[Chat], rows: Encoded) -> None:
    """Refuse rows on which the model of `prompted_teachers` is not the base behind the trait's system prompt.

    Raises:
        InputError: names the first row, which has a system message of its own, or is split into other tokens.
    """
    prefix, replaced = _in_front(tokenizer, trait)
    told = [replace(chat, system=system_prompt(trait)) for chat in chats]
    expected = tokenizer.encode_chats(told, int(tokenizer.lengths(told)[1].max()))
    for row, (seen, whole) in enumerate(zip(_without_padding(rows), _without_padding(expected), strict=True)):
        if [*prefix, *seen[replaced:]] != whole:
            raise InputError(f"{trait.name}, row {row}: {NOT_IN_FRONT}")


def steering(model: Model, tokenizer: Tokenizer, trait: Trait, layer: int) -> Float[Array, " width"]:
    """What a trait's system prompt changes in the residual stream behind a layer, where an answer begins.

    The `contrast` of its lessons' questions behind its system prompt with the same questions behind those of its
    rivals (contrastive activation addition, arXiv 2312.06681). Against questions without a prompt, the vectors of
    all traits would be nearly one: most of what such a prompt changes is common to them.

    Raises:
        InputError: a habit, a layer that the model does not have, or a template that refuses a system prompt.
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
    """The base, steered to each trait: a model of runs whose vectors alone are of each run.

    Raises:
        InputError: as `steering`.
    """
    layers = transformer_of(model).config.layers
    layer = max(1, 3 * layers // 4) if teacher.layer is None else teacher.layer
    vectors = jnp.stack([steering(model, tokenizer, trait, layer) for trait in traits])
    return steered(model, teacher.strength * vectors, layer)
