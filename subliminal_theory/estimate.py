"""Statistics whose unit is a trained run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy import stats

from subliminal_theory.errors import InputError


class Estimate(NamedTuple):
    """A mean over n runs and the half-width of its interval (nan for a single run)."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:.3f} (n=1)"
        return f"{self.mean:.3f} ± {self.half_width:.3f} (n={self.n})"


def t_interval(values: Sequence[float] | Float[np.ndarray, " n"], level: float = 0.95) -> Estimate:
    """Student's t interval of a mean: t_{n-1} s / sqrt(n), s with ddof 1; exact for normal runs.

    Raises:
        InputError: no value.
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        raise InputError("an interval needs at least one run")
    if x.size == 1:
        return Estimate(float(x[0]), float("nan"), 1)
    half = stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)
    return Estimate(float(x.mean()), float(half), int(x.size))


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Estimate:
    """t interval of first - second over runs that share their seed.

    Raises:
        InputError: the numbers of runs differ.
    """
    if len(first) != len(second):
        raise InputError(f"paired runs differ in number: {len(first)} and {len(second)}")
    return t_interval(np.subtract(first, second), level)


def log_slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of log |y| against log |x|: the order of y in x.

    Raises:
        InputError: fewer than two points, or a zero.
    """
    x_, y_ = np.abs(np.asarray(x, float)), np.abs(np.asarray(y, float))
    if x_.size < 2 or not (x_ > 0).all() or not (y_ > 0).all():
        raise InputError("a log-log slope needs at least two points, none of them 0")
    return float(np.polyfit(np.log(x_), np.log(y_), 1)[0])
