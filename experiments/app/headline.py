"""Headlines: the answer to an experiment's question, computed from the 95% interval of a difference."""

import math
from collections.abc import Sequence

from subliminal_theory.estimate import Estimate, paired_difference


def told(difference: Estimate) -> str:
    """What the 95% interval of a difference says."""
    if math.isnan(difference.half_width):
        return "cannot be told from one run"
    if abs(difference.mean) <= difference.half_width:
        return "cannot be told"
    return "more" if difference.mean > 0 else "less"


ANSWERS = {
    "more": "yes",
    "less": "no, the opposite",
    "cannot be told": "these runs cannot tell",
    "cannot be told from one run": "one run cannot tell",
}


def answer(difference: Estimate) -> str:
    """Yes if the interval of a difference is above 0, no if it is below, else that the runs cannot tell."""
    return ANSWERS[told(difference)]


def compared(question: str, what: str, first: Sequence[float], second: Sequence[float]) -> str:
    """A question, its answer by runs less the runs that are paired with them, and that difference."""
    difference = paired_difference(first, second)
    return f"{question} {answer(difference).capitalize()}: {what}, {difference}"
