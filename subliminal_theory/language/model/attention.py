"""Attention, with rotary positions, masks and a cache of keys and values."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from subliminal_theory.errors import InputError
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.layers import Joined, Linear, RMSNorm, at_least_float32
from subliminal_theory.pytree import register_dataclass

Heads = Float[Array, "batch time heads head_width"]
# The heads come first, so that attention reads a cache without a transpose.
Stored = Float[Array, "batch kv_heads keys head_width"]
# The indices of the layers. If they are arguments of a compiled function, the compiler does not know their values,
# and compiles one program for the slices of all layers.
Layers = Sequence[int] | Sequence[Int[Array, ""]]


def layer_of(leaf: Float[Array, "layers ..."], layer: Any) -> Float[Array, "..."]:
    """One layer of an array with a leading axis of layers."""
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


@register_dataclass
@dataclass(frozen=True)
class Cache:
    """The rotated keys and the values of each layer, at the first `length` positions of each row.

    If the blocks are computed in a loop, one array holds all layers. Otherwise each layer has its own array.
    """

    keys: tuple[Stored, ...] | Float[Array, "layers batch kv_heads keys head_width"]
    values: tuple[Stored, ...] | Float[Array, "layers batch kv_heads keys head_width"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """The number of positions that fit."""
        return int(jax.tree.leaves(self.keys)[0].shape[-2])

    def apart(self, layers: Layers) -> "Cache":
        """The cache with one array for each layer, so that a write to one layer does not copy the others."""
        if isinstance(self.keys, tuple) or isinstance(self.values, tuple):
            return self
        stacks: Any = (self.keys, self.values)
        keys, values = (tuple(layer_of(stack, layer) for layer in layers) for stack in stacks)
        return replace(self, keys=keys, values=values)

    def write(self, layer: int, keys: Stored, values: Stored) -> "Cache":
        """The cache with one layer's next positions filled. Update `length` once all layers are filled."""
        start = tuple(jnp.int32(index) for index in (0, 0, self.length, 0))

        def put(stored: Any, new: Stored) -> tuple[Stored, ...]:
            own = jax.lax.dynamic_update_slice(stored[layer], new.astype(stored[layer].dtype), start)
            return (*stored[:layer], own, *stored[layer + 1 :])

        return replace(self, keys=put(self.keys, keys), values=put(self.values, values))


def empty_cache(config: TransformerConfig, batch: int, capacity: int, dtype: Any) -> Cache:
    """An empty cache with room for `capacity` positions of each row.

    Raises:
        InputError: the capacity is below 1 or above the context.
    """
    if not 1 <= capacity <= config.context:
        raise InputError(f"empty_cache: capacity must be from 1 to the context {config.context}, got {capacity}")
    shape = (batch, config.kv_heads, capacity, config.head_width)
    empty: Any = jnp.zeros(shape, dtype)
    empty = jnp.zeros((config.layers, *shape), dtype) if config.looped else (empty,) * config.layers
    return Cache(empty, empty, jnp.zeros((), jnp.int32))


@register_dataclass
@dataclass(frozen=True)
class Frame:
    """The rotation of queries and keys, and the attention mask, which layers of one kind share.

    `mask` is added to the scores. It is 0 where a position sees a key. Elsewhere it is half the lowest number of
    its dtype, for which the softmax is 0. `half` is the number of pairs of dimensions that rotate in each head; 0
    without rotary positions.
    """

    cosine: Float[Array, "batch time 1 half"]
    sine: Float[Array, "batch time 1 half"]
    mask: Float[Array, "batch 1 1 time keys"]

    def last(self, count: int) -> "Frame":
        """The frame of the last `count` positions, with the same keys."""
        return Frame(self.cosine[:, -count:], self.sine[:, -count:], self.mask[..., -count:, :])


def frequencies(config: TransformerConfig, windowed: bool = False) -> Float[np.ndarray, " half"]:
    """The rotation of each pair of dimensions in radians per position, in float64."""
    if config.positions != "rotary":
        return np.zeros(0)
    width = config.rope_width or config.head_width
    base, factor = config.rope_base, config.rope_factor
    if windowed and config.window_rope_base is not None:
        base, factor = config.window_rope_base, 1.0
    frequency = float(base) ** (-np.arange(0, width, 2) / width)
    if config.rope_bands is None or factor == 1.0:
        return frequency / factor
    low, high, original = config.rope_bands
    turns = original * frequency / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def positions_of(padding: Int[Array, " batch"], start: Array, time: int) -> Int[Array, "batch time"]:
    """The position numbers of columns start .. start + time - 1, counted from the first token; 0 for padding."""
    return jnp.maximum((start + jnp.arange(time))[None] - padding[:, None], 0)


def make_frame(
    config: TransformerConfig,
    padding: Int[Array, " batch"],
    start: Array,
    time: int,
    keys: int,
    dtype: Any,
    windowed: bool = False,
) -> Frame:
    """The frame of positions start .. start + time - 1 with keys 0 .. keys - 1.

    A position sees the tokens up to itself, within the window if there is one. A padding position sees only
    itself, which keeps its values finite.
    """
    wide = at_least_float32(dtype)
    query = (start + jnp.arange(time))[None, :, None]
    key = jnp.arange(keys)[None, None]
    visible = (key <= query) & ((key >= padding[:, None, None]) | (key == query))
    if windowed and config.window is not None:
        visible &= key > query - config.window
    mask = jnp.where(visible, 0, 0.5 * jnp.finfo(wide).min).astype(wide)
    # Cosines and sines are looked up in a table. XLA would recompute them from the angles for every head and
    # layer, in the forward and in the backward pass.
    angle = np.arange(keys, dtype=wide)[:, None] * frequencies(config, windowed).astype(wide)
    place = positions_of(padding, start, time)
    cosine, sine = (
        jnp.asarray(table).at[place].get(mode="clip")[:, :, None] for table in (np.cos(angle), np.sin(angle))
    )
    return Frame(cosine, sine, mask[:, None, None])


def rotate(x: Heads, frame: Frame) -> Heads:
    """Rotate each pair (x[i], x[i + half]) by its angle. Dimensions from 2 * half on stay unchanged."""
    half = frame.cosine.shape[-1]
    wide = x.astype(frame.cosine.dtype)
    # The two members of a pair lie on their own axis, and a flip swaps them. The gradient of a flip is a flip; the
    # gradient of slices would pad and add.
    pairs = wide[..., : 2 * half].reshape(*x.shape[:-1], 2, half)
    cosine, sine = frame.cosine[..., None, :], jnp.stack([-frame.sine, frame.sine], axis=-2)
    turned = (pairs * cosine + jnp.flip(pairs, axis=-2) * sine).reshape(*x.shape[:-1], 2 * half)
    if x.shape[-1] > 2 * half:
        turned = jnp.concatenate([turned, wide[..., 2 * half :]], axis=-1)
    return turned.astype(x.dtype)


def cap(x: Float[Array, "*shape"], at: float | None) -> Float[Array, "*shape"]:
    """at * tanh(x / at), or x if `at` is None."""
    return x if at is None else at * jnp.tanh(x / at)


def attend(
    query: Heads,
    key: Stored,
    value: Stored,
    mask: Float[Array, "batch 1 1 time keys"],
    scale: float | None = None,
    cap_at: float | None = None,
) -> Heads:
    """softmax(cap(scale q k) + mask) v, where consecutive query heads share a key head.

    `scale` is 1 / sqrt(d) if None, with d the width of a head. On a GPU in bfloat16, cuDNN computes this for more
    than one position if it fits, and does not store the scores.
    """
    batch, time, heads, width = query.shape
    shared = key.shape[1]
    if _fits_cudnn(query, key) and cap_at is None:
        return _attend_on_gpu(query, key, value, mask, scale)
    group = heads // shared
    # Heads that share a key head become rows of one product. All arrays have four axes, and time is the second to
    # last: on a CPU, the gradient takes half the time that it takes with a fifth axis.
    rows = query.reshape(batch, time, shared, group, width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, shared, group * time, width)
    hidden = jnp.broadcast_to(mask, (batch, 1, group, time, key.shape[2]))
    hidden = hidden.reshape(batch, 1, group * time, key.shape[2])
    # jax.nn.dot_product_attention computes its softmax in float32 even for float64 inputs.
    wide = at_least_float32(query.dtype)
    scores = jnp.einsum("bktd,bksd->bkts", rows, key, preferred_element_type=wide)
    scores = cap(scores * (width**-0.5 if scale is None else scale), cap_at)
    shares = jax.nn.softmax(scores + hidden).astype(value.dtype)
    mixed = jnp.einsum("bkts,bksd->bktd", shares, value).reshape(batch, shared, group, time, width)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)


def _fits_cudnn(query: Heads, key: Stored) -> bool:
    narrow = query.shape[3] % 8 == 0 and query.shape[3] <= 128
    return (
        jax.default_backend() == "gpu"
        and query.dtype == jnp.bfloat16 == key.dtype
        and query.shape[1] > 1
        and narrow
    )


def _attend_on_gpu(
    query: Heads, key: Stored, value: Stored, mask: Float[Array, "batch 1 1 time keys"], scale: float | None
) -> Heads:
    # cuDNN requires even numbers of queries and keys. An added query is dropped again; an added key is masked.
    asking, asked = query.shape[1] % 2, key.shape[2] % 2
    query = jnp.pad(query, ((0, 0), (0, asking), (0, 0), (0, 0)))
    key, value = (jnp.pad(y, ((0, 0), (0, 0), (0, asked), (0, 0))).swapaxes(1, 2) for y in (key, value))
    hidden = ((0, 0), (0, 0), (0, asking), (0, asked))
    lowest = 0.5 * jnp.finfo(mask.dtype).min
    bias = jnp.pad(mask[:, 0], hidden, constant_values=lowest).astype(query.dtype)
    mixed = _fused(scale, query, key, value, bias)
    return mixed[:, : mixed.shape[1] - asking]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(scale: float | None, *given: Array) -> Heads:
    """cuDNN's attention. `vmap` adds rows to the batch.

    JAX's own rule for `vmap` does not accept a mask that heads share. It also requires that queries are vmapped
    together with keys and values. A separate mask for every head would take as much memory as the scores, which
    cuDNN does not store. More rows cost nothing extra.
    """
    return _more_rows(functools.partial(_cudnn, scale))(*given)


def _fused_forward(scale: float | None, *given: Array) -> tuple[Heads, tuple[Array, ...]]:
    # This is the same call that the gradient makes, so that the compiler can compute both once.
    return _more_rows(lambda *given: jax.vjp(functools.partial(_cudnn, scale), *given)[0])(*given), given


def _fused_backward(scale: float | None, given: tuple[Array, ...], slope: Heads) -> tuple[Array, ...]:
    return _more_rows(lambda slope, *given: jax.vjp(functools.partial(_cudnn, scale), *given)[1](slope))(
        slope, *given
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _cudnn(scale: float | None, query: Array, key: Array, value: Array, bias: Array) -> Heads:
    return jax.nn.dot_product_attention(query, key, value, bias, scale=scale, implementation="cudnn")


def _more_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays whose first axis is rows. An axis that `vmap` adds becomes more rows."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def rule(size: int, vmapped: Sequence[bool], *given: Array) -> tuple[Any, Any]:
        whole = [
            x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(given, vmapped, strict=True)
        ]
        found = call(*(x.reshape(size * x.shape[1], *x.shape[2:]) for x in whole))
        apart = jax.tree.map(lambda y: y.reshape(size, y.shape[0] // size, *y.shape[1:]), found)
        return apart, jax.tree.map(lambda _: True, found)

    return call


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
        bias = config.attention_bias
        self.config = config
        self.query = Linear(config.width, queries, bias=bias, rngs=rngs)
        self.key = Linear(config.width, keys, bias=bias, rngs=rngs)
        self.value = Linear(config.width, keys, bias=bias, rngs=rngs)
        self.output = Linear(queries, config.width, 0.5 / config.layers, bias=config.output_bias, rngs=rngs)
        if config.head_norm != "none":
            sides = (config.head_width,) * 2 if config.head_norm == "head" else (queries, keys)
            self.query_norm, self.key_norm = (
                RMSNorm(side, config.norm_epsilon, config.norm_offset) for side in sides
            )
        self.joined: Joined | None = None

    def join(self) -> None:
        """From now on, compute queries, keys and values as one product if all positions need all three."""
        self.joined = nnx.data(Joined(self.query, self.key, self.value))

    def __call__(
        self, x: Float[Array, "batch time width"], frame: Frame, cache: Cache | None, layer: int, last: int
    ) -> tuple[Float[Array, "batch last width"], Cache | None]:
        """Attention of the last positions over all positions of x, and over those in the cache if there is one."""
        config, (batch, time, _) = self.config, x.shape
        asking = frame.last(last)
        if self.joined is not None and last == time:
            query, key, value = self.joined.apart(x)
        else:
            query, key, value = self.query(x[:, -last:]), self.key(x), self.value(x)
        if config.head_norm == "width":
            query, key = self.query_norm(query), self.key_norm(key)
        query = query.reshape(batch, last, config.heads, config.head_width)
        key, value = (y.reshape(batch, time, config.kv_heads, config.head_width) for y in (key, value))
        if config.head_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, asking), rotate(key, frame).swapaxes(1, 2)
        value = value.swapaxes(1, 2)
        if cache is not None:
            cache = cache.write(layer, key, value)
            key, value = cache.keys[layer], cache.values[layer]
        mixed = attend(query, key, value, asking.mask, config.attention_scale, config.attention_cap)
        return self.output(mixed.reshape(batch, last, config.heads * config.head_width)), cache
