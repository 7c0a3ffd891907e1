"""The probability that an answer begins with each of several words. Each prompt is computed only once.

A word has several spellings, and a spelling may have several tokens. After a prompt, the tokens of all spellings
form a tree. Besides the prompt, only the predictions at the inner nodes of the tree must be computed. The longest
branches, without their leaves, are rows that continue from the cached keys and values of the prompt. Tokens at the
start that all prompts share are computed once.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from subliminal_theory.language.model.attention import Cache, empty_cache
from subliminal_theory.language.model.layers import at_least_float32
from subliminal_theory.language.model.lora import unmerged
from subliminal_theory.language.model.transformer import Text, Transformer, transformer_of
from subliminal_theory.model import Model, rounded
from subliminal_theory.pytree import register_dataclass

MEMORY = 2**30  # bytes for the keys, values and logits of the prompts that are computed at once


@register_dataclass
@dataclass(frozen=True)
class Spellings:
    """Words that may begin the answers to prompts. `of` makes them.

    Attributes:
        tokens: the tokens of each spelling, padded with -1.
        branches: for each length, the branches of the tree of spellings after each prompt, padded with zeros.
        nodes: the node that predicts each token of a spelling after the first. It is an index into the tokens of
            `branches`, counted over lengths, then branches, then tokens; -1 where there is no token.
        shared: the number of leading columns that all prompts share; they are computed once.
    """

    tokens: Int[Array, "prompts words spellings tokens"]
    branches: tuple[Int[Array, "prompts branches length"], ...]
    nodes: Int[Array, "prompts words spellings behind"]
    shared: int = field(default=0, metadata={"static": True})

    @classmethod
    def of(cls, text: Text, tokens: Int[np.ndarray, "prompts words spellings tokens"]) -> Self:
        """The spellings after each prompt, from their tokens, padded with -1."""
        tokens = np.asarray(tokens)
        found = [_tree(list(map(_without_filling, table.reshape(-1, table.shape[-1])))) for table in tokens]
        lengths = range(1, tokens.shape[-1])
        most = [max(sum(len(one) == length for one in branches) for branches in found) for length in lengths]
        rows = [
            np.zeros((len(found), count, length), np.int32) for count, length in zip(most, lengths, strict=True)
        ]
        starts = np.cumsum([0, *(table[0].size for table in rows)])
        nodes = np.full((*tokens.shape[:-1], tokens.shape[-1] - 1), -1, np.int32)
        for prompt, branches in enumerate(found):
            first = dict[tuple[int, ...], int]()  # the node of each prefix
            seen = dict.fromkeys(lengths, 0)
            for branch in branches:
                length, place = len(branch), seen[len(branch)]
                rows[length - 1][prompt, place] = branch
                for depth in range(length):
                    first[branch[: depth + 1]] = int(starts[length - 1]) + place * length + depth
                seen[length] += 1
            for spot in np.ndindex(tokens.shape[1:3]):
                spelling = _without_filling(tokens[prompt][spot])
                for depth in range(1, len(spelling)):
                    nodes[prompt][spot][depth - 1] = first[spelling[:depth]]
        return cls(
            jnp.asarray(tokens, jnp.int32),
            tuple(jnp.asarray(table) for table in rows if table.size),
            jnp.asarray(nodes),
            _shared(text),
        )


def _without_filling(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens if token >= 0)


def _tree(spellings: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The proper prefixes of spellings that are not prefixes of longer ones."""
    inner = dict.fromkeys(spelling[:-1] for spelling in spellings if len(spelling) > 1)
    within = {longer[:length] for longer in inner for length in range(1, len(longer))}
    return [beginning for beginning in inner if beginning not in within]


def _shared(text: Text) -> int:
    """How many leading columns of the longest prompt, except the last, have tokens that all prompts share."""
    tokens, padding = np.asarray(text.tokens), np.asarray(text.padding)
    rows = [row[skipped:] for row, skipped in zip(tokens, padding, strict=True)]
    length = min(map(len, rows))
    alike = np.all(np.stack([row[:length] for row in rows]) == rows[0][:length], axis=0)
    common = int(np.argmin(np.append(alike, False)))
    return min(int(padding.min()) + common, tokens.shape[1] - 1)


def heard(
    model: Model, text: Text, words: Spellings
) -> tuple[Float[Array, "prompts n"], Float[Array, "prompts words spellings"]]:
    """Logits at the end of prompts, and the log-probability of each spelling's tokens after the first.

    The latter is 0 for a spelling of one token. As many prompts are computed at once as `MEMORY` allows.

    Raises:
        InputError: a spelling has several tokens, but the model is not a Transformer or its context is too short.
    """
    if not words.branches:
        return model(text)[:, -1], jnp.zeros(words.tokens.shape[:-1])
    network = transformer_of(rounded(unmerged(model)))
    capacity = text.tokens.shape[1] + max(table.shape[-1] for table in words.branches)
    front = _front(network, text, words.shared)

    def some(given: tuple[Text, Spellings]) -> tuple[Array, Array]:
        own, spelt = given
        logits, cache = _read(network, own, front, words.shared, capacity)
        return logits, _behind(network, own, cache, spelt)

    return _in_pieces(some, (replace(text, last=1), words), _at_once(network, capacity, words))


def _front(network: Transformer, text: Text, columns: int) -> tuple[Cache | None, Int[Array, ""]]:
    """The keys and values of the shared columns, as a cache of one row, and the padding of that row."""
    first = jnp.argmin(text.padding)
    padding = text.padding[first]
    if not columns:
        return None, padding
    cache = empty_cache(network.config, 1, columns, network.dtype)
    row = Text(text.tokens[first, :columns][None], padding[None], last=1)
    return network.extend(row, cache)[1], padding


def _read(
    network: Transformer,
    text: Text,
    front: tuple[Cache | None, Int[Array, ""]],
    columns: int,
    capacity: int,
) -> tuple[Float[Array, "prompts n"], Cache]:
    """Logits at the end of prompts, and the cache, with room for the branches."""
    cache = empty_cache(network.config, len(text.tokens), capacity, network.dtype)
    shared, padding = front
    if shared is not None:
        # A row with more padding has the shared tokens further right. Keys depend on positions, not on columns.
        moved = jnp.maximum(jnp.arange(columns)[None] - (text.padding - padding)[:, None], 0)

        def place(leaf: Array) -> Array:
            rows = jnp.moveaxis(jnp.take(leaf[..., 0, :, :, :], moved, axis=-2), -3, -4)
            return jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, capacity - columns), (0, 0)])

        keys, values = jax.tree.map(place, (shared.keys, shared.values))
        cache = replace(cache, keys=keys, values=values, length=jnp.int32(columns))
    logits, cache = network.extend(replace(text, tokens=text.tokens[:, columns:]), cache)
    return logits[:, -1], cache


def _behind(
    network: Transformer, text: Text, cache: Cache, words: Spellings
) -> Float[Array, "prompts words spellings"]:
    prompts, start = len(text.tokens), 0
    wanted = jnp.maximum(words.tokens[..., 1:], 0).reshape(prompts, -1)
    nodes = words.nodes.reshape(prompts, -1)
    found = jnp.zeros(wanted.shape, at_least_float32(network.dtype))
    for table in words.branches:
        _, count, length = table.shape
        repeat = functools.partial(jnp.repeat, repeats=count, axis=-4)
        keys, values = jax.tree.map(repeat, (cache.keys, cache.values))
        rows = Text(table.reshape(-1, length), jnp.repeat(text.padding, count))
        logits, _ = network.extend(rows, replace(cache, keys=keys, values=values))
        size = logits.shape[-1]
        logits = logits.reshape(prompts, count * length, size)
        place = jnp.clip(nodes - start, 0, count * length - 1)
        one = jnp.take_along_axis(logits.reshape(prompts, -1), place * size + wanted, axis=1)
        one -= jnp.take_along_axis(jax.nn.logsumexp(logits, axis=-1), place, axis=1)
        found += jnp.where((nodes >= start) & (nodes < start + count * length), one, 0)
        start += count * length
    return found.reshape(words.nodes.shape).sum(axis=-1)


def _at_once(network: Transformer, capacity: int, words: Spellings) -> int:
    """The number of prompts to compute at once."""
    config, branches = network.config, words.branches
    cache = 2 * config.layers * config.kv_heads * config.head_width * capacity * jnp.dtype(network.dtype).itemsize
    copies = 1 + max(table.shape[1] for table in branches)
    logits = 2 * 4 * config.vocabulary * max(table[0].size for table in branches)
    return max(1, MEMORY // (cache * copies + logits))


def _in_pieces(function: Callable[[Any], Any], given: Any, most: int) -> Any:
    """Apply a function of rows to at most `most` rows at once."""
    rows = len(jax.tree.leaves(given)[0])
    parts = -(-rows // most)
    if parts == 1:
        return function(given)
    size = -(-rows // parts)

    def cut(leaf: Array) -> Array:
        filled = jnp.pad(leaf, [(0, parts * size - rows)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        return filled.reshape(parts, size, *leaf.shape[1:])

    found = jax.lax.map(function, jax.tree.map(cut, given))
    return jax.tree.map(lambda leaf: leaf.reshape(parts * size, *leaf.shape[2:])[:rows], found)
