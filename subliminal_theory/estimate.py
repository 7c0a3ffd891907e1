"""Statistics whose unit is a trained run."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Real
from scipy import stats

from subliminal_theory.errors import InputError

Numbers = Sequence[float | int] | Real[np.ndarray, " n"] | Real[Array, " n"]


class Estimate(NamedTuple):
    """A mean over n runs, and the half-width of its confidence interval (nan for a single run)."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return format(self, ".3f")

    def __format__(self, form: str) -> str:
        """Format the numbers with a format specification such as `.2g`."""
        if not form:
            return str(self)
        if self.n == 1:
            return f"{self.mean:{form}} (n=1)"
        return f"{self.mean:{form}} ± {self.half_width:{form}} (n={self.n})"


def t_interval(values: Numbers, level: float = 0.95) -> Estimate:
    """A mean with Student's t interval: half-width t_{n-1} s / sqrt(n), s with ddof 1; exact for normal values.

    Raises:
        InputError: there is no value.
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        raise InputError("an interval needs at least one run")
    if x.size == 1:
        return Estimate(float(x[0]), float("nan"), 1)
    half = stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)
    return Estimate(float(x.mean()), float(half), int(x.size))


def paired_difference(first: Sequence[float | int], second: Sequence[float | int]) -> Estimate:
    """The mean of first - second with its t interval, for runs paired by seed.

    Raises:
        InputError: the numbers of runs differ.
    """
    if len(first) != len(second):
        raise InputError(f"paired runs differ in number: {len(first)} and {len(second)}")
    return t_interval(np.subtract(first, second))


class Share(NamedTuple):
    """A share of a variance and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def variance_shares(
    levels: Mapping[str, Sequence[object]], values: Float[np.ndarray, "settings seeds"], draws: int = 1000
) -> dict[str, Share]:
    """The share of the variance of single runs that each factor of a balanced design explains.

    A factor's share is its first-order Sobol index, Var(E[y | level]) / Var(y). It is computed as the sum of
    squares of the factor's levels minus the part expected by chance, so a factor without effect has a share of 0
    on average. If every combination of levels occurs exactly once, the part by chance comes from the noise between
    seeds. Otherwise (settings drawn at random) it comes from all variance within a level. `seed` is the share of
    the variance within settings. `together` is the rest: effects that factors have only in combination.

    Intervals are bootstrap percentiles with fixed draws. The bootstrap resamples the seeds of each setting if
    every combination occurs exactly once, and otherwise the settings.

    Args:
        levels: for each factor, its level in every setting.
        values: one value for each run, [settings, seeds].
        draws: the number of bootstrap draws.

    Raises:
        InputError: there are fewer than two settings; a factor does not have one level per setting; a factor is
            named `seed` or `together`.
    """
    count, seeds = len(values), values.shape[1] if values.ndim > 1 else 0
    if count < 2 or any(len(column) != count for column in levels.values()):
        raise InputError(
            f"shares of variance need a level of every factor for each of at least two settings: {count}"
        )
    if taken := {"seed", "together"} & set(levels):
        raise InputError(f"shares of variance: a factor cannot be named {taken.pop()!r}")
    codes = {
        name: np.unique([str(entry) for entry in column], return_inverse=True)[1]
        for name, column in levels.items()
    }
    if np.ptp(values) == 0:
        return {name: Share(math.nan, math.nan, math.nan) for name in (*codes, "together", "seed")}
    sizes = [int(code.max()) + 1 for code in codes.values()]
    complete = count == math.prod(sizes) == len(set(zip(*codes.values(), strict=True)))
    point, rng = _shares(codes, values, complete), np.random.default_rng(0)
    if complete:
        chosen = rng.integers(seeds, size=(draws, count, seeds))
        resampled = [_shares(codes, np.take_along_axis(values, i, 1), True) for i in chosen]
    else:
        chosen = rng.integers(count, size=(draws, count))
        resampled = [_shares({n: c[i] for n, c in codes.items()}, values[i], False) for i in chosen]
    return {
        name: Share(share, *np.nanpercentile([draw[name] for draw in resampled], [2.5, 97.5]))
        for name, share in point.items()
    }


def _shares(codes: Mapping[str, np.ndarray], values: np.ndarray, complete: bool) -> dict[str, float]:
    means, (count, seeds) = values.mean(1), values.shape
    within = float(values.var(axis=1, ddof=1).mean()) if seeds > 1 else 0.0
    everything = float(((means - means.mean()) ** 2).sum())
    squares, freedom = {}, {}
    for name, code in codes.items():
        sizes, sums = np.bincount(code), np.bincount(code, means)
        present = sizes > 0
        squares[name] = float((sizes[present] * (sums[present] / sizes[present] - means.mean()) ** 2).sum())
        freedom[name] = int(present.sum()) - 1
    if complete and seeds > 1:
        chance = dict.fromkeys(codes, within / seeds)
    elif complete:
        # With one run per setting, noise cannot be separated from joint effects.
        left = count - 1 - sum(freedom.values())
        chance = dict.fromkeys(codes, max(everything - sum(squares.values()), 0.0) / max(left, 1))
    else:
        chance = {name: (everything - squares[name]) / max(count - 1 - freedom[name], 1) for name in codes}
    settings = count if complete else count - 1
    between = (everything - (count - 1) * within / seeds) / settings
    total = between + within
    if total <= 0:
        return dict.fromkeys((*codes, "together", "seed"), math.nan)
    shares = {name: (squares[name] - freedom[name] * chance[name]) / settings / total for name in codes}
    seed = within / total
    return {**shares, "together": 1 - sum(shares.values()) - seed, "seed": seed}


def log_slope(x: Numbers, y: Numbers) -> float:
    """Least-squares slope of log |y| against log |x|: the order of y in x.

    Raises:
        InputError: there are fewer than two points, or a value is 0.
    """
    x_, y_ = np.abs(np.asarray(x, float)), np.abs(np.asarray(y, float))
    if x_.size < 2 or not (x_ > 0).all() or not (y_ > 0).all():
        raise InputError("a log-log slope needs at least two points, none of them 0")
    return float(np.polyfit(np.log(x_), np.log(y_), 1)[0])


class MatrixTest(NamedTuple):
    """How far a diagonal stands out, and the share of permutations that stand out at least as far."""

    statistic: float
    p: float


def matrix_test(matrices: Float[np.ndarray, "..."], draws: int = 20_000) -> MatrixTest:
    """A permutation test of whether run i responds most to question i.

    The statistic is the mean of the diagonals minus the mean of all other entries. Under the null hypothesis, the
    runs of a group (those that share a base model) are exchangeable. If there are at most `draws` permutations
    within groups, all of them count. Otherwise `draws` random ones count (always the same), together with the
    observed one, so that p is valid.

    Args:
        matrices: one for each group, [groups, n, n]: rows are runs, columns are questions.
        draws: the number of random permutations.

    Raises:
        InputError: there is no group, or the matrices are not square or are smaller than 2 x 2.
    """
    groups, n = len(matrices), matrices.shape[-1]
    if not groups or matrices.ndim != 3 or matrices.shape[1] != n or n < 2:
        raise InputError(f"a matrix test needs square matrices of at least 2 x 2, got shape {matrices.shape}")
    total = float(matrices.sum())

    def statistic(diagonal: float) -> float:
        return diagonal / (groups * n) - (total - diagonal) / (groups * n * (n - 1))

    found = float(np.trace(matrices, axis1=1, axis2=2).sum())
    if math.factorial(n) ** groups <= draws:
        orders = np.array(list(itertools.permutations(range(n))))
        each = matrices[:, np.arange(n), orders].sum(-1)  # groups, permutations
        diagonals = functools.reduce(lambda a, b: (a[:, None] + b[None]).reshape(-1), each)
        hits, count = int((diagonals >= found - 1e-12 * abs(total)).sum()), len(diagonals)
    else:
        rng = np.random.default_rng(0)
        orders = rng.permuted(np.tile(np.arange(n), (draws, groups, 1)), axis=-1)
        picked = np.take_along_axis(matrices[None], orders[..., None], axis=-1)[..., 0]
        diagonals = picked.sum((1, 2))
        hits, count = int((diagonals >= found - 1e-12 * abs(total)).sum()) + 1, draws + 1
    return MatrixTest(statistic(found), hits / count)
