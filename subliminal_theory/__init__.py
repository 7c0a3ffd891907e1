"""Subliminal learning as one experiment at three sizes: a theorem, a toy and a language model."""

from subliminal_theory import alignment, audit, inits, theorem
from subliminal_theory.channel import Channel, SampledToken, SoftLogits, SquaredError, Subset, TopK, WeightedSum
from subliminal_theory.distill import distill, teach
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, PerLayer, Perturbed, Policy, Shared
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.source import Batch, Examples, Source
from subliminal_theory.theorem import check, how_small

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Channel",
    "Examples",
    "Fresh",
    "InputError",
    "Interpolated",
    "JensenShannon",
    "Model",
    "PerLayer",
    "Perturbed",
    "Policy",
    "ReverseKL",
    "SampledToken",
    "Shared",
    "SoftLogits",
    "Source",
    "SquaredError",
    "Subset",
    "TopK",
    "WeightedSum",
    "alignment",
    "audit",
    "check",
    "distill",
    "from_nnx",
    "how_small",
    "inits",
    "teach",
    "theorem",
]
