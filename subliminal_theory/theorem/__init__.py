"""The gradient-step theorem and what follows from it, on any differentiable function."""

from subliminal_theory.theorem.certificate import Certificate, certificate
from subliminal_theory.theorem.conditions import Conditions, covers
from subliminal_theory.theorem.contraction import Contraction, Sharpness, contraction, displacement, sharpness
from subliminal_theory.theorem.one_step import Report, check
from subliminal_theory.theorem.small_steps import SmallSteps, how_small

__all__ = [
    "Certificate",
    "Conditions",
    "Contraction",
    "Report",
    "Sharpness",
    "SmallSteps",
    "certificate",
    "check",
    "contraction",
    "covers",
    "displacement",
    "how_small",
    "sharpness",
]
