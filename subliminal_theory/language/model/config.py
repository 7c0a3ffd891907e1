"""The shape of a language model."""

import math
from dataclasses import dataclass
from typing import Any

from subliminal_theory.errors import InputError, shown

# Up to FEW blocks are compiled one after another. More blocks are compiled as a loop over one block, which takes
# the compile time of one.
FEW = 3
NORMS = ("rms", "layer")
HEAD_NORMS = ("none", "head", "width")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
POSITIONS = ("rotary", "learned")

_SIZES = ("vocabulary", "layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "context")
_CHOICES = {"norm": NORMS, "head_norm": HEAD_NORMS, "activation": ACTIVATIONS, "positions": POSITIONS}
_POSITIVE = ("rope_base", "norm_epsilon", "rope_factor", "embedding_scale")
_POSITIVE_OR_NONE = ("window_rope_base", "attention_scale", "attention_cap", "logit_cap")
_FLAGS = ("tied", "norm_offset", "pre_norm", "post_norm", "parallel", "gated")
_BIASES = ("attention_bias", "output_bias", "mlp_bias")


@dataclass(frozen=True)
class TransformerConfig:
    """The settings that determine the parameters' shapes and the function of a `Transformer`.

    Attributes:
        vocabulary: number of tokens and of logits.
        layers: number of blocks.
        width: width of the residual stream.
        heads: number of query heads, a multiple of `kv_heads`.
        kv_heads: number of key and value heads. heads / kv_heads consecutive query heads share one.
        head_width: width of a query, key or value.
        mlp_width: hidden width of the MLP.
        tied: whether the embedding is also the output matrix.
        rope_base: pair i of d / 2 rotates by rope_base^(-2 i / d) radians per position.
        norm_epsilon: added to the mean square or the variance before the root.
        context: the largest number of positions in a row, padding included.
        norm: `rms` (root mean square), or `layer` (layer norm with a bias).
        norm_offset: whether an RMS norm multiplies by 1 + scale instead of scale.
        pre_norm, post_norm: whether attention and MLP have a norm before them, and after them.
        parallel: whether attention and MLP read the same input; otherwise the MLP reads the sum with attention.
        head_norm: norm of queries and keys before their rotation: `none`, `head` (each head) or `width` (all heads
            together).
        attention_bias: whether queries, keys and values have biases.
        output_bias: whether the output of attention has a bias.
        mlp_bias: whether the MLP has biases.
        gated, activation: the MLP is down(f(gate(x)) * up(x)) if gated, otherwise down(f(up(x))).
        positions: `rotary`, or `learned`: an embedding of `context` positions that is added to the tokens'
            embedding.
        rope_width: how many dimensions of a head rotate, counted from the first; None for all.
        rope_factor: divides the rotation of all pairs, or of the slow pairs if `rope_bands` is given.
        rope_bands: (low, high, original context). Pairs that rotate more than `high` times within the original
            context keep their rotation. Pairs that rotate less than `low` times are divided by `rope_factor`.
            Between the two, the rotation is interpolated linearly.
        window: in windowed layers, a position sees this many positions, itself included.
        windowed: whether each layer is windowed; empty if there is no window.
        window_rope_base: base in the windowed layers, where `rope_factor` does not apply. None for the same base
            and factor as elsewhere.
        embedding_scale: multiplies the embedding of the inputs, but not the output matrix.
        attention_scale: multiplies the scores; None for head_width^(-1/2).
        attention_cap, logit_cap: scores and logits become cap * tanh(x / cap); None for no cap.

    Raises:
        InputError: a value has the wrong type or is out of range; the message names it.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    tied: bool
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    context: int = 1024
    norm: str = "rms"
    norm_offset: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    head_norm: str = "none"
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    positions: str = "rotary"
    rope_width: int | None = None
    rope_factor: float = 1.0
    rope_bands: tuple[float, float, int] | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    window_rope_base: float | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            self._require(name, _whole(getattr(self, name)), "a positive integer")
        for name in _POSITIVE:
            self._require(name, _positive(getattr(self, name)), "a positive, finite number")
        for name in _POSITIVE_OR_NONE:
            value = getattr(self, name)
            self._require(name, value is None or _positive(value), "a positive, finite number or none")
        for name in _FLAGS + _BIASES:
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        for name, known in _CHOICES.items():
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        if self.heads % self.kv_heads:
            raise InputError(
                f"TransformerConfig: heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        turned = self.rope_width
        if turned is None and self.positions == "rotary" and self.head_width % 2:
            raise InputError(f"TransformerConfig: head_width must be even, got {self.head_width}")
        fits = turned is None or (_whole(turned) and turned % 2 == 0 and turned <= self.head_width)
        self._require("rope_width", fits, f"none, or even and from 2 to {self.head_width}")
        if not (self.pre_norm or self.post_norm):
            raise InputError("TransformerConfig: a block needs pre_norm or post_norm")
        self._require("window", self.window is None or _whole(self.window), "a positive integer or none")
        flags = all(isinstance(flag, bool) for flag in self.windowed)
        right = flags and len(self.windowed) == (self.layers if self.window else 0)
        self._require("windowed", right, "true or false for each layer if there is a window, else empty")
        if self.rope_bands is not None:
            low, high, original = self.rope_bands
            ordered = _positive(low) and _positive(high) and low < high and _whole(original)
            self._require("rope_bands", ordered, "two ascending numbers and a number of positions")

    @property
    def looped(self) -> bool:
        """Whether the blocks are computed in a loop."""
        return self.layers > FEW

    def _require(self, name: str, right: bool, what: str) -> None:
        if not right:
            raise InputError(f"TransformerConfig: {name} must be {what}, got {shown(getattr(self, name))}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
