"""A decoder-only language model: one code path for whole rows and for rows that grow behind a cache.

    model = from_nnx(Transformer(config, rngs=nnx.Rngs(0)))
    model(text)                                  # logits of every position
    cache = empty_cache(config, batch, capacity, jnp.float32)
    logits, cache = extend(model, text, cache)   # the same, keys and values kept for what follows

Pre-norm blocks of RMS norms, rotary positions (arXiv 2104.09864), grouped queries (arXiv 2305.13245) and
gated MLPs (arXiv 2002.05202), without biases.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subliminal_theory.errors import InputError
from subliminal_theory.language.config import TransformerConfig
from subliminal_theory.model import Model

Heads = Float[Array, "batch time heads head_width"]
# Heads first: a cache in this order is read as it lies.
Stored = Float[Array, "batch kv_heads keys head_width"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Text:
    """Rows of token numbers, padded on the left to one length.

    `padding` counts the padding positions of each row from the row's very start, so it stays the same when
    a row is given piece by piece. Which tokens of the vocabulary stand there has no influence on the others.
    With `last`, logits are asked of the last positions alone, which spares what only the others need.
    """

    tokens: Int[Array, "batch time"]
    padding: Int[Array, " batch"]
    last: int | None = field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys, after their rotation, and values of each layer at the first `length` positions of some rows."""

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """The number of positions that there is room for."""
        return self.keys[0].shape[2]

    def write(self, layer: int, keys: Stored, values: Stored) -> "Cache":
        """One layer's next positions filled in; `length` stays until all layers have written."""
        start = tuple(jnp.int32(index) for index in (0, 0, self.length, 0))

        def put(stored: tuple[Stored, ...], new: Stored) -> tuple[Stored, ...]:
            own = jax.lax.dynamic_update_slice(stored[layer], new.astype(stored[layer].dtype), start)
            return (*stored[:layer], own, *stored[layer + 1 :])

        return replace(self, keys=put(self.keys, keys), values=put(self.values, values))


def empty_cache(config: TransformerConfig, batch: int, capacity: int, dtype: Any) -> Cache:
    """A cache with room for `capacity` positions of each row.

    Raises:
        InputError: a capacity below 1 or beyond the context.
    """
    if not 1 <= capacity <= config.context:
        raise InputError(f"empty_cache: capacity must be from 1 to the context {config.context}, got {capacity}")
    empty = (jnp.zeros((batch, config.kv_heads, capacity, config.head_width), dtype),) * config.layers
    return Cache(empty, empty, jnp.zeros((), jnp.int32))


def _wide(dtype: Any) -> Any:
    """The format of norms, rotations, softmaxes and logits: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _multiply(x: Float[Array, "batch time inputs"], matrix: Float[Array, "inputs outputs"], dtype: Any) -> Array:
    """x @ matrix as one product of matrices: the gradient of a batched one takes twice as long on a CPU."""
    flat = jnp.matmul(x.reshape(-1, matrix.shape[0]), matrix, preferred_element_type=dtype)
    return flat.reshape(*x.shape[:2], matrix.shape[1])


def _normal(rngs: nnx.Rngs, shape: tuple[int, int], variance: float) -> Float[Array, "inputs outputs"]:
    return variance**0.5 * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """x @ kernel, which starts as N(0, gain / inputs)."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(_normal(rngs, (inputs, outputs), gain / inputs))

    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time outputs"]:
        """The product, of each position alone."""
        return _multiply(x, self.kernel[...], None)


class RMSNorm(nnx.Module):
    """scale * x / sqrt(mean(x^2) + epsilon) over the last axis; `scale` starts at 1."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """The normalised activations in the format of x."""
        wide = x.astype(_wide(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...][None, None]).astype(x.dtype)


@dataclass(frozen=True)
class Frame:
    """What all layers share: how positions turn their queries and keys, and which keys a position sees.

    `mask` is added to the scores: 0 where a key is seen, else half the lowest number, whose softmax is 0.
    """

    cosine: Float[Array, "batch time 1 half"]
    sine: Float[Array, "batch time 1 half"]
    mask: Float[Array, "batch 1 1 time keys"]

    def last(self, count: int) -> "Frame":
        """The frame of the last positions, before the same keys."""
        return Frame(self.cosine[:, -count:], self.sine[:, -count:], self.mask[..., -count:, :])


def make_frame(
    config: TransformerConfig, padding: Int[Array, " batch"], start: Array, time: int, keys: int, dtype: Any
) -> Frame:
    """The frame of positions start .. start + time - 1 before keys 0 .. keys - 1.

    A position sees the real positions up to itself; a padding position sees itself alone, which keeps it finite.
    """
    query = (start + jnp.arange(time))[None, :, None]
    key = jnp.arange(keys)[None, None]
    skipped = padding[:, None, None]
    visible = (key <= query) & ((key >= skipped) | (key == query))
    half = config.head_width // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=_wide(dtype)) / half)
    angle = jnp.maximum(query - skipped, 0).astype(frequency.dtype)[..., None] * frequency[None, None, None]
    mask = jnp.where(visible, 0, 0.5 * jnp.finfo(_wide(dtype)).min).astype(_wide(dtype))
    return Frame(jnp.cos(angle), jnp.sin(angle), mask[:, None, None])


def rotate(x: Heads, frame: Frame) -> Heads:
    """Turn each pair (x[i], x[i + d / 2]) by its angle."""
    first, second = jnp.split(x.astype(frame.cosine.dtype), 2, axis=-1)
    turned = (first * frame.cosine - second * frame.sine, second * frame.cosine + first * frame.sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attend(query: Heads, key: Stored, value: Stored, mask: Float[Array, "batch 1 1 time keys"]) -> Heads:
    """softmax(q k / sqrt(d) + mask) v; consecutive query heads share a key head."""
    batch, time, heads, width = query.shape
    shared = key.shape[1]
    grouped = query.reshape(batch, time, shared, heads // shared, width)
    # Not jax.nn.dot_product_attention: its softmax is in float32 even for float64 inputs.
    wide = _wide(query.dtype)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, key, preferred_element_type=wide) * width**-0.5
    shares = jax.nn.softmax(scores + mask).astype(value.dtype)
    return jnp.einsum("bkgts,bksd->btkgd", shares, value).reshape(batch, time, heads, width)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
        self.config = config
        self.query = Linear(config.width, queries, rngs=rngs)
        self.key = Linear(config.width, keys, rngs=rngs)
        self.value = Linear(config.width, keys, rngs=rngs)
        self.output = Linear(queries, config.width, 0.5 / config.layers, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"], frame: Frame, cache: Cache | None, layer: int, last: int
    ) -> tuple[Float[Array, "batch last width"], Cache | None]:
        """Mix values over the positions of x, or with a cache over those in it too, for the last positions."""
        config, (batch, time, _) = self.config, x.shape
        shared = (batch, time, config.kv_heads, config.head_width)
        asking = frame.last(last)
        query = rotate(self.query(x[:, -last:]).reshape(batch, last, config.heads, config.head_width), asking)
        key = rotate(self.key(x).reshape(shared), frame).swapaxes(1, 2)
        value = self.value(x).reshape(shared).swapaxes(1, 2)
        if cache is not None:
            cache = cache.write(layer, key, value)
            key, value = cache.keys[layer], cache.values[layer]
        mixed = attend(query, key, value, asking.mask)
        return self.output(mixed.reshape(batch, last, config.heads * config.head_width)), cache


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = Linear(config.width, config.mlp_width, rngs=rngs)
        self.up = Linear(config.width, config.mlp_width, rngs=rngs)
        self.down = Linear(config.mlp_width, config.width, 0.5 / config.layers, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """One position at a time."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = GatedMLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"], frame: Frame, cache: Cache | None, layer: int, last: int
    ) -> tuple[Float[Array, "batch last width"], Cache | None]:
        """The residual stream of the last positions after the block."""
        mixed, cache = self.attention(self.attention_norm(x), frame, cache, layer, last)
        x = x[:, -last:] + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nnx.Module):
    """Embedding, blocks, a last norm and the output matrix; call it through `from_nnx`.

    Parameters are `embedding` [vocabulary, width], `layers/i/{attention_norm,mlp_norm}/scale`,
    `layers/i/attention/{query,key,value,output}/kernel`, `layers/i/mlp/{gate,up,down}/kernel`, `norm/scale`
    and, unless tied, `head/kernel` [width, vocabulary]; kernels are [inputs, outputs]. Matrices start as
    N(0, 1 / inputs), the embedding as N(0, 1 / width), those that write into the residual stream (`output`,
    `down`) as N(0, 1 / (2 layers inputs)), which keeps its variance from growing with depth. Norms, softmaxes
    and logits are in at least float32, and in float64 for float64 parameters.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (config.vocabulary, config.width)
        self.embedding = nnx.Param(_normal(rngs, shape, 1 / config.width))
        self.layers = nnx.List(Block(config, rngs=rngs) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        if not config.tied:
            self.head = Linear(config.width, config.vocabulary, rngs=rngs)

    def __call__(self, text: Text) -> Float[Array, "batch last vocabulary"]:
        """Logits of whole rows, of all positions unless the text asks for the last ones alone.

        All of a row is nan if one of its tokens is outside the vocabulary.

        Raises:
            InputError: rows longer than the context, or other last positions asked for than 1 to all.
        """
        time = text.tokens.shape[1]
        if time > self.config.context:
            raise InputError(f"Transformer: {time} positions exceed the context of {self.config.context}")
        return self._compute(text, None)[0]

    def extend(self, text: Text, cache: Cache) -> tuple[Float[Array, "batch time vocabulary"], Cache]:
        """As the function `extend`."""
        time, capacity = text.tokens.shape[1], cache.capacity
        known = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
        if known + time > capacity:
            raise InputError(f"extend: {time} positions after {known} exceed the cache's capacity of {capacity}")
        logits, written = self._compute(text, cache)
        assert written is not None
        return logits, replace(written, length=cache.length + time)

    def _compute(
        self, text: Text, cache: Cache | None
    ) -> tuple[Float[Array, "batch last vocabulary"], Cache | None]:
        time, embedding = text.tokens.shape[1], self.embedding[...]
        last = time if text.last is None else text.last
        if text.last is not None and not 1 <= last <= time:
            raise InputError(f"Text: last must be from 1 to the {time} positions, got {last}")
        start, keys = (jnp.int32(0), time) if cache is None else (cache.length, cache.capacity)
        frame = make_frame(self.config, text.padding, start, time, keys, embedding.dtype)
        x = jnp.take(embedding, text.tokens, axis=0, mode="fill")
        for number, layer in enumerate(self.layers):
            # What the last block makes of the other positions, nothing reads.
            x, cache = layer(x, frame, cache, number, last if number == len(self.layers) - 1 else time)
        matrix = embedding.T if self.config.tied else self.head.kernel[...]
        return _multiply(self.norm(x), matrix, _wide(x.dtype)), cache


def transformer_of(model: Model) -> Transformer:
    """The network of a model made by `from_nnx`, with the model's parameters, frozen ones too.

    Raises:
        InputError: the model computes something else; merge low-rank factors first.
    """
    graph = getattr(model.apply, "graph", None)
    module = None if graph is None else nnx.merge(graph, nnx.State(model.all_params))
    if not isinstance(module, Transformer):
        raise InputError("the model is no plain Transformer: take one of from_nnx, and merge low-rank factors")
    return module


def extend(model: Model, text: Text, cache: Cache) -> tuple[Float[Array, "batch time vocabulary"], Cache]:
    """Logits of positions that follow those in the cache, and the cache with them.

    Equal to the logits of the whole row at any split into pieces, down to single tokens and within the padding.
    Where `cache.length` is traced, it is up to the caller that the positions fit: beyond the capacity the
    result is wrong.

    Raises:
        InputError: the positions do not fit, or the model is no plain Transformer.
    """
    return transformer_of(model).extend(text, cache)
