"""A decoder-only language model: one code path for whole rows and for rows that grow with a cache.

    model = from_nnx(Transformer(config, rngs=nnx.Rngs(0)))
    model(text)                                  # logits of every position
    cache = empty_cache(config, batch, capacity, jnp.float32)
    logits, cache = extend(model, text, cache)   # the same logits; the cache keeps keys and values

Blocks have attention (grouped queries, arXiv 2305.13245; rotary positions, arXiv 2104.09864) and an MLP (gated,
arXiv 2002.05202), with norms. The configuration selects any of the families in `hub/families`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from subliminal_theory.errors import InputError
from subliminal_theory.language.model.attention import (
    Attention,
    Cache,
    Frame,
    Layers,
    cap,
    layer_of,
    make_frame,
    positions_of,
)
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.layers import MLP, Linear, make_norm, normal, wide_product
from subliminal_theory.model import Functional, Model
from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Text:
    """Rows of token numbers, padded on the left to one length.

    `padding` counts the padding positions from the start of each row. It stays the same when a row is given piece
    by piece. The tokens at padding positions do not influence the other positions. With `last`, the model returns
    logits for only this many last positions, and saves the work that only the others need.
    """

    tokens: Int[Array, "batch time"]
    padding: Int[Array, " batch"]
    last: int | None = field(default=None, metadata={"static": True})


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or both in parallel. Norms come before, after, or both."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.parallel = config.parallel
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.attention_norm = make_norm(config) if config.pre_norm else None
        self.mlp_norm = make_norm(config) if config.pre_norm else None
        self.attention_post_norm = make_norm(config) if config.post_norm else None
        self.mlp_post_norm = make_norm(config) if config.post_norm else None

    def __call__(
        self, x: Float[Array, "batch time width"], frame: Frame, cache: Cache | None, layer: int, last: int
    ) -> tuple[Float[Array, "batch last width"], Cache | None]:
        """The residual stream of the last positions after the block."""
        before = x if self.attention_norm is None else self.attention_norm(x)
        mixed, cache = self.attention(before, frame, cache, layer, last)
        x = x[:, -last:]
        if self.attention_post_norm is not None:
            mixed = self.attention_post_norm(mixed)
        read = x if self.parallel else x + mixed
        found = self.mlp(read if self.mlp_norm is None else self.mlp_norm(read))
        if self.mlp_post_norm is not None:
            found = self.mlp_post_norm(found)
        return x + mixed + found, cache


class Transformer(nnx.Module):
    """Embedding, blocks, a final norm and the output matrix. Call it through `from_nnx`.

    Parameters are `embedding` [vocabulary, width], `layers/*/{attention_norm,mlp_norm}/scale`,
    `layers/*/attention/{query,key,value,output}/kernel`, `layers/*/mlp/{gate,up,down}/kernel`, `norm/scale`
    and, unless tied, `head/kernel` [width, vocabulary]. The configuration may add or remove some. Parameters under
    `layers/*` have a leading axis of layers. Kernels are [inputs, outputs]. Matrices start as N(0, 1 / inputs),
    the embedding as N(0, 1 / width). Matrices that write to the residual stream (`output`, `down`) start as
    N(0, 1 / (2 layers inputs)), so that its variance does not grow with depth. Norms, softmaxes and logits are in
    at least float32, and in float64 for float64 parameters. `remat` is gradient checkpointing of each block.

    A steered model (`steered.py`) also has `steering` [layers, width]. Row i is added to the residual stream of
    every position after layer i + 1, where layers count from 1.
    """

    factored = ("layers/*/kernel",)
    gathered = ("embedding", "positions")
    steering: nnx.Param | None = None
    _joined: tuple[Block, ...] | None = None

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, remat: bool = False) -> None:
        self.config, self.remat = config, remat
        self.embedding = nnx.Param(normal(rngs, (config.vocabulary, config.width), 1 / config.width))
        if config.positions == "learned":
            self.positions = nnx.Param(normal(rngs, (config.context, config.width), 1 / config.width))
        self.layers = nnx.Dict({"*": _stack(config, rngs)})
        self.norm = make_norm(config)
        if not config.tied:
            self.head = Linear(config.width, config.vocabulary, rngs=rngs)

    def __call__(self, text: Text) -> Float[Array, "batch last vocabulary"]:
        """Logits of whole rows at all positions, or at the last positions if the text asks for them.

        If a token is outside the vocabulary, all logits of its row are nan.

        Raises:
            InputError: rows are longer than the context, or `last` is not from 1 to their length.
        """
        return self.readout(self.features(text))

    def join(self, layers: Layers) -> None:
        """From now on, compute block by block with copies of the matrices. This is for generation token by token.

        A loop over blocks would copy the matrices of each block, and its part of the cache, for every token.
        """
        graph, state = nnx.split(self.layers["*"])
        blocks = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: layer_of(leaf, i), state)) for i in layers]
        for block in blocks:
            block.attention.join()
            block.mlp.join()
        self._joined = nnx.data(tuple(blocks))

    def steer(self) -> None:
        """Add the parameter `steering`, which starts as 0."""
        # With a row for every layer, models steered at different layers share one compiled function.
        self.steering = nnx.Param(jnp.zeros((self.config.layers, self.config.width), jnp.float32))

    @property
    def dtype(self) -> Any:
        """The dtype of the residual stream."""
        return self.norm.scale.dtype

    def features(self, text: Text) -> Float[Array, "batch last width"]:
        """The input of the output matrix, at the positions whose logits are asked for. Raises as a call does."""
        return self.norm(self.stream(text, self.config.layers))

    def stream(self, text: Text, blocks: int) -> Float[Array, "batch last width"]:
        """The residual stream after `blocks` blocks, at the positions asked for. Raises as a call does."""
        time = text.tokens.shape[1]
        if time > self.config.context:
            raise InputError(f"Transformer: {time} positions exceed the context of {self.config.context}")
        return self._compute(text, None, blocks)[0]

    def readout(self, features: Float[Array, "... width"]) -> Float[Array, "... vocabulary"]:
        """The logits from `features`."""
        matrix = self.embedding[...].T if self.config.tied else self.head.kernel[...]
        matrix = matrix.astype(features.dtype)
        logits = wide_product(features.reshape(math.prod(features.shape[:-1]), features.shape[-1]), matrix)
        return cap(logits, self.config.logit_cap).reshape(*features.shape[:-1], matrix.shape[1])

    def extend(self, text: Text, cache: Cache) -> tuple[Float[Array, "batch last vocabulary"], Cache]:
        """See the function `extend`."""
        time, capacity = text.tokens.shape[1], cache.capacity
        known = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
        if known + time > capacity:
            raise InputError(f"extend: {time} positions after {known} exceed the cache's capacity of {capacity}")
        x, written = self._compute(text, cache, self.config.layers)
        assert written is not None
        return self.readout(self.norm(x)), replace(written, length=cache.length + time)

    def _compute(
        self, text: Text, cache: Cache | None, blocks: int
    ) -> tuple[Float[Array, "batch last width"], Cache | None]:
        """The residual stream of the last positions after the first `blocks` blocks, and the filled cache."""
        config, time = self.config, text.tokens.shape[1]
        last = time if text.last is None else text.last
        if text.last is not None and not 1 <= last <= time:
            raise InputError(f"Text: last must be from 1 to the {time} positions, got {last}")
        start, keys = (jnp.int32(0), time) if cache is None else (cache.length, cache.capacity)
        windowed = config.windowed or (False,) * config.layers
        kinds = sorted(set(windowed))
        frame_of = functools.partial(make_frame, config, text.padding, start, time, keys, self.dtype)
        frames, kind = [frame_of(kind) for kind in kinds], [kinds.index(own) for own in windowed[:blocks]]
        x = self._embed(text, start)
        if config.looped and self._joined is None:
            x, cache = self._looped(x, frames, kind, cache)
            return x[:, -last:], cache
        for number, block in enumerate((self._joined or self.blocks())[:blocks]):
            # Nothing reads the output of the last block at the other positions.
            kept = last if number == blocks - 1 else time
            if self.remat and cache is None:
                x = jax.checkpoint(functools.partial(_alone, block, frames[kind[number]], kept))(x)
            else:
                x, cache = block(x, frames[kind[number]], cache, number, kept)
            if self.steering is not None:
                x = x + self.steering[number].astype(x.dtype)[None, None]
        return x, cache

    def blocks(self) -> tuple[Block, ...]:
        """The blocks, each with its own parameters."""
        graph, state = nnx.split(self.layers["*"])
        leaves, structure = jax.tree.flatten(state)
        # A split and not an index: the gradient of a split is one concatenation.
        apart = zip(*(jax.lax.split(leaf, (1,) * self.config.layers) for leaf in leaves), strict=True)
        return tuple(nnx.merge(graph, jax.tree.unflatten(structure, [leaf[0] for leaf in own])) for own in apart)

    def _looped(
        self,
        x: Float[Array, "batch time width"],
        frames: Sequence[Frame],
        kind: Sequence[int],
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """The residual stream after the first `len(kind)` blocks, in a loop over one block."""
        graph, state = nnx.split(self.layers["*"])
        some, blocks = jax.tree.map(lambda *own: jnp.stack(own), *frames), len(kind)
        past = None if cache is None else (cache.keys, cache.values)
        scanned = (
            state,
            None if self.steering is None else self.steering[...],
            jnp.asarray(kind, jnp.int32),
            past,
        )

        def step(x: Array, own: Any) -> tuple[Array, Any]:
            state, steering, kind, past = own
            frame = frames[0] if len(frames) == 1 else jax.tree.map(lambda leaf: leaf[kind], some)
            before = None if cache is None else Cache((past[0],), (past[1],), cache.length)
            x, after = nnx.merge(graph, state)(x, frame, before, 0, x.shape[1])
            x = x if steering is None else x + steering.astype(x.dtype)[None, None]
            return x, None if after is None else (after.keys[0], after.values[0])

        step = jax.checkpoint(step, prevent_cse=False) if self.remat and cache is None else step
        # All blocks run if there is a cache, because each of them writes to it.
        own = scanned if blocks == self.config.layers else jax.tree.map(lambda leaf: leaf[:blocks], scanned)
        x, written = jax.lax.scan(step, x, own)
        return x, cache if cache is None else replace(cache, keys=written[0], values=written[1])

    def _embed(self, text: Text, start: Array) -> Float[Array, "batch time width"]:
        x = jnp.take(self.embedding[...], text.tokens, axis=0, mode="fill").astype(self.dtype)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.config.positions == "learned":
            places = positions_of(text.padding, start, text.tokens.shape[1])
            x = x + jnp.take(self.positions[...], places, axis=0, mode="clip").astype(self.dtype)
        return x


def _alone(
    block: Block, frame: Frame, last: int, x: Float[Array, "batch time width"]
) -> Float[Array, "batch last width"]:
    return block(x, frame, None, 0, last)[0]


def _stack(config: TransformerConfig, rngs: nnx.Rngs) -> Block:
    """One block with the parameters of all blocks, on a leading axis of layers. Keys are drawn layer by layer."""
    matrices = 7 if config.gated else 6

    def build(*keys: Key[Array, ""]) -> tuple[nnx.GraphDef, nnx.State]:
        own: Any = SimpleNamespace(params=iter(keys).__next__)
        return nnx.split(Block(config, rngs=own))

    drawn = [[rngs.params() for _ in range(matrices)] for _ in range(config.layers)]
    keys = (_stacked_keys(own) for own in zip(*drawn, strict=True))
    return nnx.merge(*jax.vmap(build)(*keys))


def _stacked_keys(keys: Sequence[Key[Array, ""]]) -> Key[Array, " layers"]:
    data = jnp.stack([jax.random.key_data(key) for key in keys])
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys[0]))


def transformer_of(model: Model) -> Transformer:
    """The network of a model made by `from_nnx`, with all its parameters, frozen ones included.

    Raises:
        InputError: the model is not a plain Transformer, or has LoRA factors that are not merged.
    """
    module = model.apply.module(model.all_params) if isinstance(model.apply, Functional) else None
    if not isinstance(module, Transformer):
        raise InputError("the model is not a plain Transformer: take one of from_nnx, and merge low-rank factors")
    return module


def extend(model: Model, text: Text, cache: Cache) -> tuple[Float[Array, "batch last vocabulary"], Cache]:
    """Logits of positions that follow those in the cache, and the cache with the new positions.

    The logits equal those of the whole row, however it is split into pieces: single tokens and pieces of padding
    are allowed. If `cache.length` is traced, the caller must ensure that the positions fit into the capacity.
    Otherwise the result is wrong.

    Raises:
        InputError: the positions do not fit, or the model is not a plain Transformer.
    """
    return transformer_of(model).extend(text, cache)
