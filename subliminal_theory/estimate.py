"""Statistics whose unit is a trained run."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Real
from scipy import stats

from subliminal_theory.errors import InputError

Numbers = Sequence[float | int] | Real[np.ndarray, " n"] | Real[Array, " n"]


class Estimate(NamedTuple):
    """A mean over n runs, and the half-width of its confidence interval (nan for a single run).

    `of` is the structure of the runs, such as "8 traits x 4 bases", if they have one.
    """

    mean: float
    half_width: float
    n: int
    of: str = ""

    def __str__(self) -> str:
        return format(self, ".3f")

    def __format__(self, form: str) -> str:
        """Format the numbers with a format specification such as `.2g`."""
        if not form:
            return str(self)
        if self.n == 1:
            return f"{self.mean:{form}} (n=1)"
        return f"{self.mean:{form}} ± {self.half_width:{form}} (n={self.of or self.n})"


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


@dataclass(frozen=True)
class Runs(Sequence[float]):
    """Values of runs that share traits and bases, so that they are not independent: one of each for every run.

    `replica` says what `bases` are: "base", or "seed" if all seeds start from one checkpoint.
    """

    values: tuple[float, ...]
    traits: tuple[Any, ...]
    bases: tuple[Any, ...]
    replica: str = "base"

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: Any) -> Any:
        return self.values[place]

    def cells(self) -> dict[tuple[Any, Any], float]:
        """The mean of the runs of each trait and base that occur together."""
        found: dict[tuple[Any, Any], list[float]] = {}
        for trait, base, value in zip(self.traits, self.bases, self.values, strict=True):
            found.setdefault((trait, base), []).append(value)
        return {cell: float(np.mean(values)) for cell, values in found.items()}

    def table(self) -> Float[np.ndarray, "traits bases"]:
        """The means of all cells.

        Raises:
            InputError: there is no run, or a trait and a base do not occur together; names the first such pair.
        """
        cells, traits, bases = self.cells(), dict.fromkeys(self.traits), dict.fromkeys(self.bases)
        if not cells:
            raise InputError("an interval needs at least one run")
        for trait, base in itertools.product(traits, bases):
            if (trait, base) not in cells:
                raise InputError(
                    f"no run of trait {trait!r} and {self.replica} {base!r}: an interval needs every trait with "
                    f"every {self.replica}; compute the missing run"
                )
        return np.array([[cells[trait, base] for base in bases] for trait in traits])

    def design(self) -> str:
        """The numbers of traits and bases in words, such as "8 traits x 4 bases"."""
        traits, bases = len({*self.traits}), len({*self.bases})
        if bases == 1:
            return f"{_count(traits, 'trait')} of one {self.replica}"
        return f"{_count(traits, 'trait')} x {_count(bases, self.replica)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class _Spread(NamedTuple):
    """A mean, its standard error (nan for a single run), and the degrees of freedom of that error."""

    mean: float
    error: float
    freedom: float


def _spread(runs: Numbers) -> _Spread:
    table = runs.table() if isinstance(runs, Runs) else np.asarray(runs, dtype=float)
    if min(table.shape) > 1 and table.ndim > 1:
        return _crossed(table)
    x = table.reshape(-1)
    if x.size < 2:
        return _Spread(float(x.mean()), math.nan, math.nan)
    return _Spread(float(x.mean()), float(x.std(ddof=1) / np.sqrt(x.size)), x.size - 1)


def _crossed(table: Float[np.ndarray, "traits bases"]) -> _Spread:
    """Two-way analysis of variance: rows and columns are random, their interaction is noise."""
    i, j = table.shape
    mean, rows, columns = table.mean(), table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    free = np.array([i - 1, j - 1, (i - 1) * (j - 1)])
    sums = (
        j * ((rows - mean) ** 2).sum(),
        i * ((columns - mean) ** 2).sum(),
        ((table - rows - columns + mean) ** 2).sum(),
    )
    squares = np.array(sums) / free
    # A factor counts only if it varies by more than the noise. Rounding must not decide between equal squares.
    above = squares[:2] > squares[2] * (1 + 1e-9) + 1e-24 * np.square(table).max()
    weighted = np.array([*above, 1 - above.sum()]) * squares
    variance = weighted.sum()
    freedom = variance**2 / (weighted**2 / free).sum() if variance > 0 else free[2]
    return _Spread(float(mean), float(np.sqrt(variance / (i * j))), float(freedom))


def interval(runs: Numbers) -> Estimate:
    """A mean with its 95% interval, as the structure of the runs demands.

    For plain values, this is `t_interval`. Runs of several traits on several bases (`Runs`) are crossed: both are
    random, and so is their interaction. With the mean squares MSA of I traits, MSB of J bases and MSE of the
    interaction, the variance of the mean is [max(MSA - MSE, 0) + max(MSB - MSE, 0) + MSE] / (I J). The degrees of
    freedom are Satterthwaite's, of the mean squares that remain in this sum, with their coefficients. Several runs
    of one trait and base are averaged first. Runs of one base have a t interval over traits, runs of one trait a
    t interval over bases.

    In simulations of normal effects with 3 or more traits and bases, such intervals contain the mean in 95 to 98%
    of tables if traits or bases vary, and in up to 99.5% if neither does. With 2 traits or bases that vary most,
    they contain it in only 90%: two levels say little about how much levels vary.

    Raises:
        InputError: there is no run, or a trait and a base of `Runs` do not occur together.
    """
    if not isinstance(runs, Runs):
        return t_interval(runs)
    mean, error, freedom = _spread(runs)
    half, n = stats.t.ppf(0.975, freedom) * error, len(runs.cells())
    return Estimate(mean, float(half), n, runs.design() if n > 1 else "")


def method(runs: Sequence[float | int]) -> str:
    """What the intervals of such runs are, in words for reports and captions."""
    if not isinstance(runs, Runs):
        return "95% t interval over runs"
    levels = {"trait": len({*runs.traits}), runs.replica: len({*runs.bases})}
    several = [f"{name}s" for name, number in levels.items() if number > 1]
    if len(several) < 2:
        return f"95% t interval over {several[0]}" if several else "no interval of one run"
    few = [f"{name}s" for name, number in levels.items() if number == 2]
    doubt = f" (too narrow if the 2 {few[0]} differ most)" if few else ""
    return f"95% interval, {several[0]} and {several[1]} crossed{doubt}"


def difference(first: Sequence[float | int], second: Sequence[float | int]) -> Sequence[float]:
    """First - second, for runs paired by trait and base, or else by their order.

    Raises:
        InputError: the numbers of runs differ, or a trait and a base occur on one side only.
    """
    if isinstance(first, Runs) and isinstance(second, Runs):
        left, right = first.cells(), second.cells()
        for trait, base in left.keys() ^ right.keys():
            raise InputError(
                f"paired runs differ: trait {trait!r} and {first.replica} {base!r} are on one side only"
            )
        traits, bases = zip(*left, strict=True) if left else ((), ())
        return Runs(tuple(left[cell] - right[cell] for cell in left), traits, bases, first.replica)
    if len(first) != len(second):
        raise InputError(f"paired runs differ in number: {len(first)} and {len(second)}")
    return np.subtract(first, second).tolist()


def paired_difference(first: Sequence[float | int], second: Sequence[float | int]) -> Estimate:
    """The mean of first - second with its interval, for runs paired by trait and base, or else by their order.

    Raises:
        InputError: as for `difference` and `interval`.
    """
    return interval(difference(first, second))


def p_value(runs: Numbers, null: float = 0.0) -> float:
    """The two-sided p of a mean: below 0.05 exactly if `null` is outside of the 95% interval; nan for one run.

    Raises:
        InputError: as for `interval`.
    """
    mean, error, freedom = _spread(runs)
    if error == 0:
        return float(mean == null)
    return float(2 * stats.t.sf(abs(mean - null) / error, freedom))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's step-down method (1979); nan counts as 1.

    Among tests with an adjusted p of at most 0.05, any false rejection has a probability of at most 5%.
    """
    found = np.nan_to_num(np.asarray(p, dtype=float), nan=1.0)
    order = np.argsort(found, kind="stable")
    steps = np.maximum.accumulate(found[order] * np.arange(len(found), 0, -1))
    adjusted = np.empty_like(found)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted.tolist()


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
