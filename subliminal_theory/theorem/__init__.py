"""The gradient-step theorem and what follows from it, on any differentiable function."""

from subliminal_theory.theorem.one_step import Report, SmallSteps, check, how_small

__all__ = ["Report", "SmallSteps", "check", "how_small"]
