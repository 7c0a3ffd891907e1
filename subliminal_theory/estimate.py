"""Statistics whose unit is a trained run."""

import math
from collections.abc import Mapping, Sequence
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


class Share(NamedTuple):
    """A share of a variance and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def variance_shares(
    levels: Mapping[str, Sequence[object]], values: Float[np.ndarray, "settings seeds"], draws: int = 1000
) -> dict[str, Share]:
    """How much of the variance of single runs each factor of a balanced random design explains.

    A factor's share is its first-order Sobol index, Var(E[y | level]) / Var(y), estimated by omega squared (its
    sum of squares less what its levels get by chance, so that a factor without effect has 0 on average).
    `seed` is the variance within settings, `together` the rest: what factors do only in combination. Intervals
    are percentiles of a bootstrap over settings, whose draws are always the same.

    Raises:
        InputError: fewer than two settings, or a factor with another number of entries than there are settings.
    """
    count = len(values)
    if count < 2 or any(len(column) != count for column in levels.values()):
        raise InputError(
            f"shares of variance need a level of every factor for each of at least two settings: {count}"
        )
    codes = {
        name: np.unique([str(entry) for entry in column], return_inverse=True)[1]
        for name, column in levels.items()
    }
    rng = np.random.default_rng(0)
    point = _shares(codes, values)
    resampled = [
        _shares({n: c[i] for n, c in codes.items()}, values[i]) for i in rng.integers(count, size=(draws, count))
    ]
    return {
        name: Share(share, *np.nanpercentile([draw[name] for draw in resampled], [2.5, 97.5]))
        for name, share in point.items()
    }


def _shares(codes: Mapping[str, np.ndarray], values: np.ndarray) -> dict[str, float]:
    means, seeds = values.mean(1), values.shape[1]
    within = float(values.var(axis=1, ddof=1).mean()) if seeds > 1 else 0.0
    total = float(means.var(ddof=1)) + within * (1 - 1 / seeds)
    shares, explained, freedom = {}, 0.0, 0
    squares = {}
    for name, code in codes.items():
        sizes = np.bincount(code)
        sums = np.bincount(code, means)
        present = sizes > 0
        squares[name] = float((sizes[present] * (sums[present] / sizes[present] - means.mean()) ** 2).sum())
        freedom += int(present.sum()) - 1
        explained += squares[name]
    everything = float(((means - means.mean()) ** 2).sum())
    residual = max(everything - explained, 0.0) / max(len(means) - 1 - freedom, 1)
    for name, code in codes.items():
        levels = len(np.unique(code))
        shares[name] = (squares[name] - (levels - 1) * residual) / (len(means) - 1) / total if total else math.nan
    seed = within / total if total else math.nan
    return {**shares, "together": 1 - sum(shares.values()) - seed, "seed": seed}


def log_slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of log |y| against log |x|: the order of y in x.

    Raises:
        InputError: fewer than two points, or a zero.
    """
    x_, y_ = np.abs(np.asarray(x, float)), np.abs(np.asarray(y, float))
    if x_.size < 2 or not (x_ > 0).all() or not (y_ > 0).all():
        raise InputError("a log-log slope needs at least two points, none of them 0")
    return float(np.polyfit(np.log(x_), np.log(y_), 1)[0])
