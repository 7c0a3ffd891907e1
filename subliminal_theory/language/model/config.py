"""The shape of a language model."""

import math
from dataclasses import dataclass
from typing import Any

from subliminal_theory.errors import InputError, shown

# Up to so many blocks compute one after the other in one program; more are a loop over one block, which compiles
# in the time of one.
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
    """Everything that decides the parameters' shapes and the function of a `Transformer`.

    Attributes:
        vocabulary: number of tokens, and of logits.
        layers: number of blocks.
        width: of the residual stream.
        heads: query heads; a multiple of `kv_heads`.
        kv_heads: key and value heads, each shared by heads / kv_heads consecutive query heads.
        head_width: of a query, key or value.
        mlp_width: hidden width of the MLP.
        tied: whether the embedding is also the output matrix.
        rope_base: pair i of d / 2 turns by rope_base^(-2 i / d) radians a position.
        norm_epsilon: added to the mean square or variance before its root.
        context: the most positions of a row, padding included.
        norm: root mean square, or layer norm with a bias.
        norm_offset: whether a norm multiplies by 1 + scale.
        pre_norm, post_norm: whether attention and MLP have a norm in front, and one behind.
        parallel: whether the MLP reads what attention reads, instead of what it left.
        head_norm: of queries and keys before they turn: none, of each head, or of all heads at once.
        attention_bias, output_bias, mlp_bias: of queries, keys and values; of attention's output; of the MLP.
        gated, activation: down(f(gate(x)) * up(x)), or down(f(up(x))).
        positions: rotary, or an embedding of `context` positions that is added to the tokens'.
        rope_width: how many of a head's first dimensions turn; all if None.
        rope_factor: angles are divided by it, all of them, or with `rope_bands` the slow ones.
        rope_bands: (low, high, original context): pairs that turn more than `high` times in the original
            context keep their angle, those that turn less than `low` times are divided, between linearly.
        window: attention in the layers of `windowed` reaches back so many positions, itself included.
        windowed: whether each layer has it; empty for none.
        window_rope_base: base in these layers, without factor, if it is another one.
        embedding_scale: multiplies the embedding where it is read, not where it is the output matrix.
        attention_scale: of scores; head_width^(-1/2) if None.
        attention_cap, logit_cap: scores and logits become cap * tanh(x / cap).

    Raises:
        InputError: a value of another type or out of range; says which.
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
        """Whether there are so many blocks that they are computed in a loop."""
        return self.layers > FEW

    def _require(self, name: str, right: bool, what: str) -> None:
        if not right:
            raise InputError(f"TransformerConfig: {name} must be {what}, got {shown(getattr(self, name))}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
