"""Sampling text from a model: one compiled loop. Its settings are array values, so a change does not recompile."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.language.model.attention import empty_cache
from subliminal_theory.language.model.layers import at_least_float32
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.model.transformer import Text, transformer_of
from subliminal_theory.model import Model, rounded

_BLOCK = 128
_ROWS = 512  # the most rows that a CPU continues at once


def transform_logits(
    logits: Float[Array, "*batch n"], temperature: ArrayLike, top_k: ArrayLike, top_p: ArrayLike
) -> Float[Array, "*batch n"]:
    """Logits whose softmax is the distribution to sample from. Excluded tokens have -inf.

    The logits are divided by the temperature; 0 keeps only the most likely token. Then the `top_k` most likely
    tokens are kept (0: all). Their probabilities are renormalized, and the fewest most likely tokens whose
    probabilities reach `top_p` are kept (1: all; at least one token). Each setting is one value, or one per row.
    Tokens with equal logits rank by number, the lowest first, so exactly `top_k` tokens are kept.
    """
    temperature, top_k, top_p = (
        jnp.broadcast_to(value, logits.shape[:-1])[..., None] for value in (temperature, top_k, top_p)
    )
    n, greedy = logits.shape[-1], temperature == 0
    scaled = logits / jnp.where(greedy, 1, temperature).astype(logits.dtype)
    scaled = _best_alone(scaled, greedy)
    top_k = jnp.where(top_k == 0, n, top_k)
    # Sorting costs more than a step of a small model, so sort only if it can change the result.
    cut = jnp.any(~greedy & ((top_k < n) | (top_p < 1)))
    return jax.lax.cond(cut, _cut, lambda scaled, *_: scaled, scaled, top_k, top_p)


def _best_alone(logits: Float[Array, "*batch n"], greedy: Bool[Array, "*batch 1"]) -> Float[Array, "*batch n"]:
    best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    return jnp.where(greedy & ~best, -jnp.inf, logits)


def _cut(
    logits: Float[Array, "*batch n"], top_k: Int[Array, "*batch 1"], top_p: Float[Array, "*batch 1"]
) -> Float[Array, "*batch n"]:
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    rank = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    ranked = jnp.where(rank < top_k, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (rank < top_k) & ((before < top_p) | (top_p >= 1) | (rank == 0))
    kept = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def draw(logits: Float[Array, "*batch n"], uniform: Float[Array, "*batch"]) -> Int[Array, "*batch"]:
    """The token at which the cumulative probability passes `uniform`: one draw for each uniform number in [0, 1).

    `jax.random.categorical` would need a random number for every token. A token with logit -inf is never drawn.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    count = -(-logits.shape[-1] // _BLOCK)
    filled = [(0, 0)] * (logits.ndim - 1) + [(0, count * _BLOCK - logits.shape[-1])]
    # Choose a block of tokens, then a token in it: sums over blocks take a tenth of the time of a cumulative sum.
    # Exponentials of the chosen block are computed again from its logits, so that they need not all be stored.
    blocks = jnp.pad(logits, filled, constant_values=-jnp.inf).reshape(*logits.shape[:-1], count, _BLOCK)
    sums = jnp.sum(jnp.exp(blocks - highest[..., None]), axis=-1)
    block, rest = _passes(sums, uniform * jnp.sum(sums, axis=-1))
    within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * _BLOCK + _passes(jnp.exp(within - highest), rest)[0]


def _passes(
    weights: Float[Array, "*batch n"], threshold: Float[Array, "*batch"]
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """The index at which the cumulative sum passes a threshold, and the threshold minus the sum before it."""
    total = jnp.cumsum(weights, axis=-1)
    # Rounding could lift the threshold to the total, after which there is no token.
    below = jnp.minimum(threshold, jnp.nextafter(total[..., -1], jnp.zeros((), total.dtype)))
    place = jnp.sum(total <= below[..., None], axis=-1, dtype=jnp.int32)
    before = jnp.take_along_axis(total - weights, place[..., None], axis=-1)[..., 0]
    return place, jnp.maximum(below - before, 0)


def sample(
    model: Model,
    text: Text,
    *,
    steps: int,
    key: Key[Array, ""],
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    stop: Sequence[int] = (),
    pad: int = 0,
    allowed: Bool[Array, " vocabulary"] | None = None,
) -> tuple[Int[Array, "batch steps"], Int[Array, " batch"]]:
    """Continue every row by up to `steps` tokens. Returns the tokens, and the number of tokens in each row.

    `temperature`, `top_k` and `top_p` are as in `transform_logits`, one value or one per row. A row ends with
    its first `stop` token, which is returned and counted. `pad` fills the rest of the row. With `allowed`, all
    other tokens have probability 0, and the other settings apply to what remains. The loop stops when all rows
    have ended. The draw of row i at step t depends only on the key, i, t and the logits of the row. LoRA factors
    are merged once, before the first token. The function is compiled once for each model structure, shape of the
    prompts, number of steps and number of stop tokens. `vmap` it over models or keys.

    Raises:
        InputError: the model is not a Transformer; prompts and steps exceed the context; a row has no token;
            `steps` is below 1; a setting is out of range, or its shape is neither one value nor one per row;
            `allowed` does not have one value per token.
    """
    model = merge_lora(model)
    config = transformer_of(model).config
    batch, length = text.tokens.shape
    if steps < 1:
        raise InputError(f"sample: steps must be at least 1, got {steps}")
    if length + steps > config.context:
        raise InputError(f"sample: {length} positions and {steps} steps exceed the context of {config.context}")
    _require_range("padding", text.padding, length - 1)
    _require_range("stop", stop, config.vocabulary - 1)
    _require_range("pad", pad, config.vocabulary - 1)
    for name, value, high in (
        ("temperature", temperature, math.inf),
        ("top_k", top_k, math.inf),
        ("top_p", top_p, 1),
    ):
        _require_range(name, value, high)
        if jnp.shape(value) not in ((), (batch,)):
            raise InputError(f"sample: {name} must be one value or {batch}, got shape {jnp.shape(value)}")
    if allowed is not None and jnp.shape(allowed) != (config.vocabulary,):
        raise InputError(f"sample: allowed must be {config.vocabulary} values, got shape {jnp.shape(allowed)}")
    dtype = at_least_float32(model.all_params["embedding"].dtype)
    settings = tuple(
        jnp.broadcast_to(jnp.asarray(value, kind), (batch,))
        for value, kind in ((temperature, dtype), (top_k, jnp.int32), (top_p, dtype))
    )
    ends, filler = jnp.asarray(stop, jnp.int32), jnp.asarray(pad, jnp.int32)
    layers = tuple(map(jnp.int32, range(config.layers)))
    return _continue(model, text, key, settings, ends, filler, allowed, layers, steps=steps)


def _require_range(name: str, given: ArrayLike | Sequence[int], high: float) -> None:
    if isinstance(given, jax.core.Tracer):
        return
    wrong = [value for value in np.ravel(np.asarray(given)) if not 0 <= value <= high]
    if wrong:
        raise InputError(f"sample: {name} must be from 0 to {high}, got {wrong[0]}")


@functools.partial(jax.jit, static_argnames="steps")
def _continue(
    model: Model,
    text: Text,
    key: Key[Array, ""],
    settings: tuple[Array, Array, Array],
    stop: Int[Array, " stops"],
    pad: Int[Array, ""],
    allowed: Bool[Array, " vocabulary"] | None,
    layers: tuple[Int[Array, ""], ...],
    *,
    steps: int,
) -> tuple[Int[Array, "batch steps"], Int[Array, " batch"]]:
    batch = len(text.tokens)
    parts = -(-batch // _ROWS) if jax.default_backend() == "cpu" else 1
    rows = (jnp.arange(batch), text, settings)
    if parts == 1:
        return _continue_rows(model, key, stop, pad, allowed, layers, steps, rows)
    # Parts run one after another: the arrays of all rows together would not fit into the caches of a CPU.
    size = -(-batch // parts)
    cut = jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, parts * size - batch)] + [(0, 0)] * (leaf.ndim - 1), mode="edge").reshape(
            parts, size, *leaf.shape[1:]
        ),
        rows,
    )
    found = jax.lax.map(functools.partial(_continue_rows, model, key, stop, pad, allowed, layers, steps), cut)
    return jax.tree.map(lambda leaf: leaf.reshape(parts * size, *leaf.shape[2:])[:batch], found)


def _uniforms(
    key: Key[Array, ""], rows: Int[Array, " batch"], steps: int, dtype: Any
) -> Float[Array, "steps batch"]:
    """The uniform random number of every step and row."""
    keys = jax.vmap(lambda row: named(key, row))(rows)

    def of_step(step: Int[Array, ""]) -> Float[Array, " batch"]:
        return jax.vmap(lambda own: jax.random.uniform(named(own, step), dtype=dtype))(keys)

    return jax.vmap(of_step)(jnp.arange(steps))


def _continue_rows(
    model: Model,
    key: Key[Array, ""],
    stop: Int[Array, " stops"],
    pad: Int[Array, ""],
    allowed: Bool[Array, " vocabulary"] | None,
    layers: tuple[Int[Array, ""], ...],
    steps: int,
    rows: tuple[Int[Array, " batch"], Text, tuple[Array, Array, Array]],
) -> tuple[Int[Array, "batch steps"], Int[Array, " batch"]]:
    """The continuation of some rows; `rows` are their indices, prompts and settings."""
    numbers, text, settings = rows
    batch, length = text.tokens.shape
    transformer = transformer_of(rounded(model))
    config = transformer.config
    # The loop reads the last token of the prompt, so logits are computed only where a token is drawn.
    cache = empty_cache(config, batch, length + steps - 1, transformer.dtype)
    _, cache = transformer.extend(Text(text.tokens[:, :-1], text.padding), cache)
    transformer.join(layers)
    cache = cache.apart(layers)
    # Drawn all at once: in the loop, they would add several kernels for each token.
    uniforms = _uniforms(key, numbers, steps, at_least_float32(transformer.dtype))
    temperature, top_k, top_p = settings
    all_tokens = jnp.all((temperature > 0) & ((top_k == 0) | (top_k >= config.vocabulary)) & (top_p >= 1))

    def choose(logits: Float[Array, "batch n"], uniform: Float[Array, " batch"]) -> Int[Array, " batch"]:
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        # Each branch includes the draw: the result of a branch is stored, and logits would take more memory than
        # tokens.
        return jax.lax.cond(
            all_tokens,
            lambda: draw(logits / temperature[:, None].astype(logits.dtype), uniform),
            lambda: draw(transform_logits(logits, *settings), uniform),
        )

    def unfinished(state: tuple) -> Array:
        step, _, ended, *_ = state
        return (step < steps) & ~jnp.all(ended)

    def advance(state: tuple) -> tuple:
        step, last, ended, lengths, tokens, cache = state
        logits, cache = transformer.extend(Text(last[:, None], text.padding), cache)
        token = jnp.where(ended, pad, choose(logits[:, 0], uniforms[step]))
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (jnp.int32(0), step))
        lengths = lengths + ~ended
        ended = ended | jnp.any(token[:, None] == stop[None], axis=-1)
        return step + 1, token, ended, lengths, tokens, cache

    start = (
        jnp.int32(0),
        text.tokens[:, -1].astype(jnp.int32),
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.full((batch, steps), pad, jnp.int32),
        cache,
    )
    *_, lengths, tokens, _ = jax.lax.while_loop(unfinished, advance, start)
    return tokens, lengths
