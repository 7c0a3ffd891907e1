"""The shape of a language model, in code and on disk."""

import json
import math
from dataclasses import asdict, dataclass, fields

from subliminal_theory.errors import InputError

_SIZES = ("vocabulary", "layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "context")


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides the parameters' shapes and the function of a `Transformer`.

    Attributes:
        vocabulary: number of tokens, and of logits.
        layers: number of blocks.
        width: of the residual stream.
        heads: query heads; a multiple of `kv_heads`.
        kv_heads: key and value heads, each shared by heads / kv_heads consecutive query heads.
        head_width: of a query, key or value; even, because rotary positions turn pairs.
        mlp_width: hidden width of the gated MLP.
        tied: whether the embedding is also the output matrix.
        rope_base: pair i of d / 2 turns by rope_base^(-2 i / d) radians a position.
        norm_epsilon: added to the mean square before its root.
        context: the most positions of a row, padding included.

    Raises:
        InputError: a size that is no positive integer, an odd head width, heads that do not share keys
            evenly, or a base or epsilon that is not positive and finite.
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

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"TransformerConfig: {name} must be a positive integer, got {value!r}")
        for name in ("rope_base", "norm_epsilon"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise InputError(f"TransformerConfig: {name} must be a positive, finite number, got {value!r}")
        if not isinstance(self.tied, bool):
            raise InputError(f"TransformerConfig: tied must be true or false, got {self.tied!r}")
        if self.heads % self.kv_heads:
            raise InputError(
                f"TransformerConfig: heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.head_width % 2:
            raise InputError(f"TransformerConfig: head_width must be even, got {self.head_width}")

    def to_json(self) -> str:
        """All fields as one JSON object."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TransformerConfig":
        """The inverse of `to_json`.

        Raises:
            InputError: no JSON object, an unknown field, a missing one (those with defaults too), or a bad value.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"TransformerConfig: not JSON: {error}") from error
        if not isinstance(given, dict):
            raise InputError(f"TransformerConfig: not a JSON object but {type(given).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        missing = [name for name in known if name not in given]
        if unknown:
            raise InputError(f"TransformerConfig: unknown field {unknown[0]!r}; there are {', '.join(known)}")
        if missing:
            raise InputError(f"TransformerConfig: missing {', '.join(missing)}")
        return cls(**given)
