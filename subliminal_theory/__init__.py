"""Subliminal learning as one experiment at three sizes: a theorem, a toy and a language model."""

from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset
from subliminal_theory.distill import distill, teach
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.source import Batch, Examples
from subliminal_theory.theorem import check, how_small

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Examples",
    "InputError",
    "Model",
    "SampledToken",
    "SoftLogits",
    "SquaredError",
    "Subset",
    "check",
    "distill",
    "from_nnx",
    "how_small",
    "teach",
]
