"""Does a number that is known beforehand foretell an outcome, run by run? Every run is judged by a fit without it.

The runs of a design lie in cells, one for each combination of levels. A number that differs between cells as the
outcome does may say nothing of the runs within a cell (Simpson's paradox), and then the cells' means foretell as
much without it. Runs of one seed share a start: fits and judgments are on different seeds, and intervals resample
seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Share

Values = Num[np.ndarray, " runs"]
Numbers = Int[np.ndarray, " runs"]
Chosen = Bool[np.ndarray, " runs"]
# From the runs to fit and the runs to judge to the values that are foretold for the latter.
Fit = Callable[[Chosen, Chosen], Float[np.ndarray, " judged"]]
DRAWS = 1000


@dataclass(frozen=True)
class Design:
    """The levels of each axis [runs] and the seeds [runs] of some runs.

    Raises:
        InputError: there are fewer than two seeds, or a cell does not have every seed once.
    """

    levels: Mapping[str, np.ndarray]
    seeds: Numbers

    def __post_init__(self) -> None:
        found = np.unique(self.seeds)
        if len(found) < 2:
            raise InputError(
                f"a forecast is judged on other seeds than it is fitted on: give two, got {len(found)}"
            )
        table = np.zeros((int(self.cells.max()) + 1, len(found)), int)
        np.add.at(table, (self.cells, np.searchsorted(found, self.seeds)), 1)
        if not (table == 1).all():
            raise InputError("a forecast needs every seed once in every cell of the design")

    @property
    def cells(self) -> Numbers:
        """The number of each run's cell."""
        return self.without(None)

    @property
    def halves(self) -> Numbers:
        """0 or 1: every other seed."""
        return np.unique(self.seeds, return_inverse=True)[1] % 2

    def without(self, axis: str | None) -> Numbers:
        """The number of each run's cell in the design without one axis."""
        columns = [values.tolist() for name, values in self.levels.items() if name != axis]
        return np.unique([repr(cell) for cell in zip(self.seeds * 0, *columns, strict=True)], return_inverse=True)[
            1
        ]

    def other_seeds(self) -> list[tuple[Chosen, Chosen]]:
        """Runs to fit and to judge: each half of the seeds by the other."""
        return [(self.halves != half, self.halves == half) for half in (0, 1)]

    def other_levels(self, axis: str) -> list[tuple[Chosen, Chosen]]:
        """Runs to fit and to judge: each level of an axis by the other levels, and on other seeds."""
        levels = self.levels[axis]
        return [
            (fitted & (levels != level), judged & (levels == level))
            for level in np.unique(levels)
            for fitted, judged in self.other_seeds()
        ]


def monotone(x: Values, y: Values) -> Fit:
    """The rising step function of x with the least squared error of y; constant beyond the fitted runs."""

    def fit(fitted: Chosen, judged: Chosen) -> np.ndarray:
        return IsotonicRegression(out_of_bounds="clip").fit(x[fitted], y[fitted]).predict(x[judged])

    return fit


def means(cells: Numbers, y: Values) -> Fit:
    """The mean of each cell; of all fitted runs if none of them is in it."""

    def fit(fitted: Chosen, judged: Chosen) -> np.ndarray:
        mean = y[fitted].mean()
        table = np.array([_mean(y[fitted & (cells == cell)], mean) for cell in range(cells.max() + 1)])
        return table[cells[judged]]

    return fit


def means_and_slope(cells: Numbers, x: Values, y: Values) -> Fit:
    """The mean of each cell plus one slope within all cells, on x in units of its deviation within the cell."""

    def fit(fitted: Chosen, judged: Chosen) -> np.ndarray:
        everyone = np.ones_like(fitted)
        level, off = means(cells, y)(fitted, everyone), x - means(cells, x)(fitted, everyone)
        spread = np.sqrt(means(cells, off**2)(fitted, everyone))
        scaled, left = off / np.where(spread > 0, spread, 1), y - level
        squared = (scaled[fitted] ** 2).sum()
        slope = (scaled[fitted] * left[fitted]).sum() / squared if squared > 0 else 0.0
        return level[judged] + slope * scaled[judged]

    return fit


def explained(
    y: Values, seeds: Numbers, folds: Sequence[tuple[Chosen, Chosen]], fit: Fit, instead_of: Fit
) -> Share:
    """1 - (squared errors of a forecast) / (those of another), out of sample: R2 if the other is the mean.

    The interval is a bootstrap over seeds of the squared errors, the fits being given.
    """
    names, place = np.unique(seeds, return_inverse=True)
    own, other = np.zeros(len(names)), np.zeros(len(names))
    for fitted, judged in folds:
        for sums, kind in ((own, fit), (other, instead_of)):
            np.add.at(sums, place[judged], (y[judged] - kind(fitted, judged)) ** 2)
    return _bootstrap(len(names), lambda weights: 1 - (weights @ own) / (weights @ other))


def correlation(x: Values, y: Values, seeds: Numbers, groups: Numbers) -> Share:
    """The mean over groups of Spearman's correlation within the group.

    Every group has every seed, all equally often. A group in which either number is constant counts as 0. The
    interval is a bootstrap over seeds of the correlation of the ranks, these being given.
    """
    names, numbers = np.unique(seeds), np.unique(groups)
    runs = np.lexsort((seeds, groups)).reshape(len(numbers), -1)
    ranks = (stats.rankdata(values[runs], axis=1) for values in (x, y))
    first, second = (values - values.mean(1, keepdims=True) for values in ranks)
    products = (first, second, first**2, second**2, first * second)
    # [seeds, groups]: what each seed adds to the sums of a group.
    sums = [values.reshape(len(numbers), len(names), -1).sum(-1).T for values in products]
    count = runs.shape[1]

    def within(weights: np.ndarray) -> np.ndarray:
        a, b, aa, bb, ab = (weights @ values / count for values in sums)
        length = np.sqrt(np.maximum(aa - a**2, 0) * np.maximum(bb - b**2, 0))
        return np.where(length > 0, (ab - a * b) / np.where(length > 0, length, 1), 0).mean(-1)

    return _bootstrap(len(names), within)


def _mean(values: np.ndarray, otherwise: float) -> float:
    return float(values.mean()) if len(values) else otherwise


def _bootstrap(count: int, statistic: Callable[[Float[np.ndarray, "draws seeds"]], np.ndarray]) -> Share:
    """A statistic of how often each seed counts, at once each, and the interval of its draws."""
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)
    (value,) = statistic(np.ones((1, count)))
    low, high = np.percentile(statistic(draws), [2.5, 97.5])
    return Share(float(value), float(low), float(high))
