"""Statistics whose unit is a trained run."""

import functools
import itertools
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
        return format(self, ".3f")

    def __format__(self, form: str) -> str:
        """The text with numbers in a form such as `.2g`."""
        if not form:
            return str(self)
        if self.n == 1:
            return f"{self.mean:{form}} (n=1)"
        return f"{self.mean:{form}} ± {self.half_width:{form}} (n={self.n})"


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


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """t interval of first - second over runs that share their seed.

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
    """How much of the variance of single runs each factor of a balanced design explains.

    A factor's share is its first-order Sobol index, Var(E[y | level]) / Var(y): the sum of squares of its levels
    less what they get by chance, so that a factor without effect has 0 on average. By chance means: from the
    noise of seeds alone where every combination of levels stands exactly once, else (settings drawn at random)
    from all that varies within a level. `seed` is the variance within settings, `together` the rest, what
    factors do only in combination. Intervals are percentiles of a bootstrap, whose draws are always the same:
    over settings, or over the seeds of each setting where every combination stands once.

    Raises:
        InputError: fewer than two settings, a factor with another number of entries than there are settings, or
            one that is named `seed` or `together`.
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
        # With one run a setting, noise cannot be told from what factors do together.
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


def log_slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of log |y| against log |x|: the order of y in x.

    Raises:
        InputError: fewer than two points, or a zero.
    """
    x_, y_ = np.abs(np.asarray(x, float)), np.abs(np.asarray(y, float))
    if x_.size < 2 or not (x_ > 0).all() or not (y_ > 0).all():
        raise InputError("a log-log slope needs at least two points, none of them 0")
    return float(np.polyfit(np.log(x_), np.log(y_), 1)[0])


class MatrixTest(NamedTuple):
    """How far a diagonal stands out, and how often a permutation does at least as well."""

    statistic: float
    p: float


def matrix_test(matrices: Float[np.ndarray, "groups n n"], draws: int = 20_000) -> MatrixTest:
    """Whether run i responds most to question i: mean of diagonals less mean of all else, and its p.

    Under the null hypothesis the runs of a group (a base) can be exchanged. All permutations within groups are
    counted if there are at most `draws` of them. Else `draws` random ones (always the same) are counted, together
    with the one that was found, so that p is valid too.

    Raises:
        InputError: no group, or matrices that are not square or smaller than 2 x 2.
    """
    groups, n = len(matrices), matrices.shape[-1]
    if not groups or matrices.ndim != 3 or matrices.shape[1] != n or n < 2:
        raise InputError(f"a matrix test needs square matrices of at least 2 x 2, got shape {matrices.shape}")
    total = matrices.sum()

    def statistic(diagonal: np.ndarray) -> np.ndarray:
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
    return MatrixTest(float(statistic(np.array(found))), hits / count)
