"""Headlines: the answer to an experiment's question, computed from the 95% interval of a difference."""

import math
from collections.abc import Sequence

from subliminal_theory.estimate import Estimate, paired_difference


def answer(difference: Estimate) -> str:
    """Yes if the interval of a difference is above 0, no if it is below, else that the runs cannot tell."""
    if math.isnan(difference.half_width):
        return "one run cannot tell"
    if abs(difference.mean) <= difference.half_width:
        return "these runs cannot tell"
    return "yes" if difference.mean > 0 else "no, the opposite"


def compared(question: str, what: str, first: Sequence[float], second: Sequence[float]) -> str:
    """A question, its answer by runs less the runs that are paired with them, and that difference."""
    difference = paired_difference(first, second)
    return f"{question} {answer(difference).capitalize()}: {what}, {difference}"
