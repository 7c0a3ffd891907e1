"""Forecasts on designs whose answer is known."""

import numpy as np
import pytest

from subliminal_theory.errors import InputError
from subliminal_theory.forecast import Design, correlation, explained, means, means_and_slope, monotone


def runs(cells=3, seeds=20):
    """Cells by seeds, and two independent normal numbers of each run."""
    level, seed = (grid.reshape(-1) for grid in np.meshgrid(np.arange(cells), np.arange(seeds), indexing="ij"))
    rng = np.random.default_rng(0)
    return (
        Design({"level": level.astype(str)}, seed),
        level,
        rng.normal(size=level.size),
        rng.normal(size=level.size),
    )


def share(design, y, fit, instead_of=None):
    instead_of = means(np.zeros_like(design.seeds), y) if instead_of is None else instead_of
    return explained(y, design.seeds, design.other_seeds(), fit, instead_of)


def test_simpsons_paradox():
    """Between cells both rise, within them one falls: R2 is high, the cells' means do better, the slope adds."""
    design, level, x, noise = runs()
    x, y = 10 * level + x, 10 * level - x + 0.1 * noise
    assert share(design, y, monotone(x, y)).value > 0.9
    assert share(design, y, monotone(x, y), means(design.cells, y)).high < 0
    assert share(design, y, means_and_slope(design.cells, x, y), means(design.cells, y)).low > 0.9
    assert (
        correlation(x, y, design.seeds, 0 * design.cells).value > 0.75
    )  # 7 / 9 if all rise between cells and fall within
    assert correlation(x, y, design.seeds, design.cells).high < -0.9


def test_a_number_without_news_adds_nothing():
    design, level, x, noise = runs()
    y = level + 0.5 * noise
    assert share(design, y, monotone(x, y)).value < 0.1
    gain = share(design, y, means_and_slope(design.cells, x, y), means(design.cells, y))
    assert gain.low < 0.02
    assert gain.value < 0.1


def test_shares_by_hand():
    """Two cells and two seeds: each half foretells the other."""
    design = Design({"a": np.array(["u", "u", "v", "v"])}, np.array([7, 9, 7, 9]))
    y = np.array([0.0, 1.0, 4.0, 7.0])
    # Means of cells: errors 1, 1, 3, 3. Means of halves are 2 and 4: errors -4, -1, 0, 5.
    assert share(design, y, means(design.cells, y)).value == pytest.approx(1 - 20 / 42)
    # A rising step function through one half: 0 and 4 for the other's u and v, or 1 and 7.
    x = np.array([1.0, 1.0, 2.0, 2.0])
    assert share(design, y, monotone(x, y)).value == pytest.approx(1 - 20 / 42)
    # On the wrong way round it is the mean.
    assert share(design, y, monotone(-x, y)).value == pytest.approx(0)


def test_other_levels_are_judged_without_their_level_and_seeds():
    design = Design({"a": np.array(["u", "u", "v", "v"]), "b": np.array(["w"] * 4)}, np.array([7, 9, 7, 9]))
    folds = [(np.flatnonzero(fitted).tolist(), np.flatnonzero(judged).tolist())
             for fitted, judged in design.other_levels("a")]  # fmt: skip
    assert folds == [([3], [0]), ([2], [1]), ([1], [2]), ([0], [3])]
    assert design.without("a").tolist() == [0, 0, 0, 0]
    y = np.array([0.0, 1.0, 4.0, 7.0])
    fitted, judged = design.other_levels("a")[0]
    assert means(design.without("a"), y)(fitted, judged).tolist() == [7.0]
    assert means(design.cells, y)(fitted, judged).tolist() == [7.0]  # an unseen cell has the mean of all


def test_intervals_resample_seeds():
    """One outcome for all runs of a seed: as wide as for one cell, however many cells there are."""
    x, y = np.random.default_rng(1).normal(size=(2, 20))
    widths = []
    for cells in (1, 8):
        seeds = runs(cells)[0].seeds
        found = correlation((x + y)[seeds], y[seeds], seeds, 0 * seeds)
        widths.append(found.high - found.low)
    assert widths[0] > 0.3
    assert widths[1] == pytest.approx(widths[0])


def test_constant_numbers_have_no_correlation():
    design, *_, noise = runs()
    assert correlation(0 * noise, noise, design.seeds, design.cells) == (0, 0, 0)


@pytest.mark.parametrize(
    ("seeds", "told"), [([0, 0, 0, 0], "give two, got 1"), ([0, 1, 0, 0], "every seed once in every cell")]
)
def test_refused(seeds, told):
    with pytest.raises(InputError, match=told):
        Design({"a": np.array(["u", "u", "v", "v"])}, np.array(seeds))
