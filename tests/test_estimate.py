import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import (
    Estimate,
    Runs,
    holm,
    interval,
    log_slope,
    matrix_test,
    method,
    p_value,
    paired_difference,
    t_interval,
    variance_shares,
)

# Student (1908), doi 10.2307/2331554: hours of sleep gained with two drugs by the same ten patients.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
moderate = st.floats(-1e3, 1e3)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(moderate, min_size=2, max_size=20), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_t_interval_is_scipys(values: list[float], level: float) -> None:
    estimate = t_interval(values, level)
    assert estimate.n == len(values)
    np.testing.assert_allclose(estimate.mean, np.mean(values), rtol=1e-12, atol=1e-12)
    if (error := stats.sem(values)) > 1e-9:
        low, high = stats.t.interval(level, len(values) - 1, np.mean(values), error)
        np.testing.assert_allclose(estimate.half_width, (high - low) / 2, rtol=1e-8)


def test_t_interval_by_hand() -> None:
    """The mean of 1..5 is 3, s = sqrt(5/2), and tables give t = 2.776 for 4 degrees of freedom."""
    estimate = t_interval([1, 2, 3, 4, 5])
    assert estimate.mean == 3
    assert estimate.half_width == pytest.approx(2.776 * np.sqrt(2.5 / 5), rel=3e-4)
    assert str(estimate) == "3.000 ± 1.963 (n=5)"
    assert t_interval(np.arange(1, 6)) == estimate


def test_paired_difference_sleep() -> None:
    """The interval of R's t.test on this pairing is 0.7001142 to 2.4598858."""
    estimate = paired_difference(SECOND, FIRST)
    assert estimate.mean == pytest.approx(1.58)
    assert estimate.mean - estimate.half_width == pytest.approx(0.7001142, abs=1e-7)
    assert estimate.mean + estimate.half_width == pytest.approx(2.4598858, abs=1e-7)
    assert paired_difference(FIRST, SECOND).mean == pytest.approx(-1.58)


def test_one_run() -> None:
    for estimate in (t_interval([2.5]), paired_difference([4.0], [1.5])):
        assert (estimate.mean, estimate.n) == (2.5, 1)
        assert np.isnan(estimate.half_width)
        assert str(estimate) == "2.500 (n=1)"


def test_equal_runs() -> None:
    assert t_interval([0.5, 0.5, 0.5]) == Estimate(0.5, 0.0, 3)


def test_refusals() -> None:
    for call in (lambda: t_interval([]), lambda: paired_difference([], [])):
        with pytest.raises(InputError, match=r"^an interval needs at least one run$"):
            call()
    with pytest.raises(InputError, match=r"^paired runs differ in number: 2 and 3$"):
        paired_difference([1, 2], [1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("runs", [2, 5])
def test_coverage(level: float, runs: int) -> None:
    repeats = 2000
    samples = np.random.default_rng(1).normal(3.0, 2.0, (repeats, runs))
    hits = sum(abs(e.mean - 3.0) <= e.half_width for e in (t_interval(row, level) for row in samples))
    assert stats.binomtest(hits, repeats, level).pvalue > 1e-3


# --- runs that share traits and bases


def runs(table, replica: str = "base") -> Runs:
    """The runs of a table [traits, bases]."""
    table = np.asarray(table, float)
    traits, bases = np.indices(table.shape).reshape(2, -1)
    return Runs(tuple(table.ravel().tolist()), tuple(f"t{i}" for i in traits), tuple(bases.tolist()), replica)


def test_crossed_by_hand_two_by_two() -> None:
    """Rows 1 3 and 5 11: the mean is 5, MSA = 36, MSB = 16, MSE = 4.

    So the variance of the mean is (36 + 16 - 4) / 4 = 12, with 48^2 / (36^2 + 16^2 + 4^2) degrees of freedom.
    """
    found = interval(runs([[1, 3], [5, 11]]))
    assert found[:1] + found[2:] == (5, 4, "2 traits x 2 bases")
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 48**2 / 1568) * np.sqrt(12))
    assert str(found).endswith(" (n=2 traits x 2 bases)")


RESIDUAL = np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1]]) * np.sqrt(4 / 6)


def test_crossed_by_hand_three_by_three() -> None:
    """Deviations of rows -2 0 2, of columns -1 0 1, and a residual: MSA = 12, MSB = 3, MSE = 1.

    The variance of the mean is (12 + 3 - 1) / 9, with 14^2 / (12^2 / 2 + 3^2 / 2 + 1^2 / 4) degrees of freedom.
    """
    table = 7 + np.array([[-2], [0], [2]]) + np.array([-1, 0, 1]) + RESIDUAL
    found = interval(runs(table))
    assert found.mean == pytest.approx(7)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 196 / 76.75) * np.sqrt(14 / 9))


def test_crossed_with_one_factor_below_noise() -> None:
    """With columns of -1/3 0 1/3, MSB = 1/3 is below MSE: the variance is 12 / 9, with 2 degrees of freedom."""
    table = np.array([[-2], [0], [2]]) + np.array([-1, 0, 1]) / 3 + RESIDUAL
    for shape in (table, table.T):
        found = interval(runs(shape))
        assert (found.mean, found.half_width) == pytest.approx((0, stats.t.ppf(0.975, 2) * np.sqrt(12 / 9)))


def test_crossed_noise_alone() -> None:
    """A residual alone, of +-1: MSE = 4 with 1 degree of freedom, so the variance of the mean is 1."""
    assert interval(runs([[1, -1], [-1, 1]])).half_width == pytest.approx(stats.t.ppf(0.975, 1))


@settings(max_examples=100)
@given(st.lists(moderate, min_size=2, max_size=8), st.integers(1, 6))
def test_crossed_without_bases_is_t_over_traits(effects: list[float], bases: int) -> None:
    table = np.repeat(np.array(effects)[:, None], bases, axis=1)
    expected = t_interval(effects)
    for shape in (table, table.T):
        found = interval(runs(shape))
        assert found.mean == pytest.approx(expected.mean, abs=1e-9)
        assert found.half_width == pytest.approx(expected.half_width, rel=1e-6, abs=1e-8)


tables = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(-9, 9), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


@pytest.mark.slow
@settings(max_examples=200)
@given(tables, st.randoms(use_true_random=False), st.integers(1, 3))
def test_crossed_does_not_depend_on_order(table: list[list[int]], random, copies: int) -> None:
    """Nor on which factor is called which, on unit and sign, or on copies of all runs."""
    first = runs(table)
    expected = interval(first)
    rows = [*zip(first.values, first.traits, first.bases, strict=True)] * copies
    random.shuffle(rows)
    shuffled = Runs(*zip(*rows, strict=True))
    swapped = Runs(first.values, first.bases, first.traits)
    scaled = interval(Runs(tuple(-3 * value for value in first), first.traits, first.bases))
    for found in (interval(shuffled), interval(swapped)):
        assert found.mean == pytest.approx(expected.mean)
        assert found.half_width == pytest.approx(expected.half_width, abs=1e-9, nan_ok=True)
    assert (scaled.mean, scaled.half_width) == pytest.approx(
        (-3 * expected.mean, 3 * expected.half_width), abs=1e-9, nan_ok=True
    )


def test_one_level() -> None:
    """Of one base a t interval over traits, of one trait one over bases, of one run none."""
    values = [1.0, 2.0, 4.0]
    for table, of in (([[v] for v in values], "3 traits of one base"), ([values], "1 trait x 3 bases")):
        assert interval(runs(table)) == Estimate(*t_interval(values)[:3], of)
    single = interval(runs([[2.5]]))
    assert np.isnan(single.half_width)
    assert str(single) == "2.500 (n=1)"


def test_runs_of_one_cell_are_averaged() -> None:
    table = runs([[1, 3], [5, 11]])
    twice = Runs((*(v - 1 for v in table), *(v + 1 for v in table)), table.traits * 2, table.bases * 2)
    assert interval(twice) == interval(table)
    assert len(twice) == 8


def test_methods_in_words() -> None:
    told = {
        "95% interval, traits and bases crossed": runs(np.zeros((8, 4))),
        "95% interval, traits and seeds crossed": runs(np.zeros((4, 3)), "seed"),
        "95% interval, traits and bases crossed (too narrow if the 2 bases differ most)": runs(np.zeros((8, 2))),
        "95% t interval over traits": runs(np.zeros((8, 1))),
        "95% t interval over bases": runs(np.zeros((1, 3))),
        "no interval of one run": runs([[0]]),
        "95% t interval over runs": [1.0, 2.0],
    }
    assert [method(values) for values in told.values()] == [*told]


def test_missing_cell() -> None:
    full = runs([[1, 2], [3, 4]])
    missing = Runs(full.values[:3], full.traits[:3], full.bases[:3])
    with pytest.raises(InputError, match=r"^no run of trait 't1' and base 1: an interval needs every trait with "):
        interval(missing)
    for pair in ((full, missing), (missing, full)):
        with pytest.raises(InputError, match=r"^paired runs differ: trait 't1' and base 1 are on one side only$"):
            paired_difference(*pair)
    with pytest.raises(InputError, match=r"^an interval needs at least one run$"):
        interval(Runs((), (), ()))


def test_pairs_by_trait_and_base() -> None:
    """Their order does not matter."""
    first, second = runs([[1, 3], [5, 11]]), runs([[0, 1], [1, 5]])
    backwards = Runs(second.values[::-1], second.traits[::-1], second.bases[::-1])
    expected = interval(runs([[1, 2], [4, 6]]))
    assert paired_difference(first, second) == paired_difference(first, backwards) == expected


def coverage(shape: tuple[int, int], sizes: tuple[float, float, float], repeats: int) -> float:
    """The share of simulated tables of normal effects whose interval contains the mean."""
    rng = np.random.default_rng(0)
    i, j = shape
    hits = 0
    for _ in range(repeats):
        effects = rng.normal(size=(i, 1)), rng.normal(size=(1, j)), rng.normal(size=shape)
        found = interval(runs(3 + sum(size * effect for size, effect in zip(sizes, effects, strict=True))))
        hits += abs(found.mean - 3) <= found.half_width
    return hits / repeats


def test_coverage_of_crossed_runs() -> None:
    """A t interval over runs contains the mean in 60% of such tables. The standard error here is 0.01."""
    assert 0.93 < coverage((8, 4), (1, 1, 1), 500) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 3), (8, 4)])
@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ((1, 0, 0.01), 0.97), ((0, 1, 0.01), 0.97), ((1, 1, 0.01), 0.98), ((1, 1, 1), 0.985), ((1, 0, 1), 0.985),
        ((0, 1, 1), 0.985), ((0.3, 1, 1), 0.985), ((0.3, 0.3, 1), 0.995), ((0, 0, 1), 0.998),
    ],
)  # fmt: skip
def test_coverage_at_large(shape: tuple[int, int], sizes: tuple[float, float, float], most: float) -> None:
    """What the docstring says; the standard error is at most 0.006."""
    assert 0.935 < coverage(shape, sizes, 1500) < most


@pytest.mark.slow
def test_coverage_of_two_bases() -> None:
    """Too low, as the docstring says."""
    assert 0.88 < coverage((8, 2), (0, 1, 1), 1500) < 0.925


# --- p values


@settings(max_examples=100)
@given(tables, st.integers(-9, 9))
def test_p_is_small_outside_of_the_interval(table: list[list[int]], null: int) -> None:
    for values in (runs(table), [*runs(table)]):
        found, p = interval(values), p_value(values, float(null))
        if math.isnan(found.half_width):
            assert math.isnan(p)
        elif abs(abs(found.mean - null) - found.half_width) > 1e-9:
            assert (p < 0.05) == (abs(found.mean - null) > found.half_width)


def test_p_value_is_scipys() -> None:
    assert p_value(np.subtract(SECOND, FIRST)) == pytest.approx(stats.ttest_rel(SECOND, FIRST).pvalue)
    assert p_value(FIRST, 0.3) == pytest.approx(stats.ttest_1samp(FIRST, 0.3).pvalue)
    assert [p_value([2.0, 2.0], null) for null in (2.0, 1.0)] == [1, 0]


def test_holm_by_hand() -> None:
    """Four tests: .005 x 4, .01 x 3, .03 x 2, and .04 x 1 is raised to the value before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, math.nan, 0.02]) == pytest.approx([1, 1, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_step_by_step(p: list[float], level: float) -> None:
    """Reject the smallest while it is at most level / (number of tests left); stop at the first that is not."""
    rejected: set[int] = set()
    for left, place in zip(range(len(p), 0, -1), sorted(range(len(p)), key=p.__getitem__), strict=True):
        if p[place] * left > level:
            break
        rejected.add(place)
    assert {place for place, q in enumerate(holm(p)) if q <= level} == rejected


# --- slopes


@settings(max_examples=100)
@given(st.floats(-5, 5), st.floats(0.01, 100), st.sampled_from([-1, 1]), st.integers(2, 10))
def test_log_slope_of_powers(exponent: float, factor: float, sign: int, points: int) -> None:
    x = np.geomspace(0.01, 10, points)
    assert log_slope(x, sign * factor * x**exponent) == pytest.approx(exponent, abs=1e-9)
    assert log_slope(-x, factor * x**exponent) == pytest.approx(exponent, abs=1e-9)


def test_log_slope_is_least_squares() -> None:
    x, y = np.array([1.0, 2, 5, 9]), np.array([3.0, 1, 4, 1.5])
    assert log_slope(x, y) == pytest.approx(stats.linregress(np.log(x), np.log(y)).slope)
    assert log_slope([1, 10], [5, 500]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1], [1]), ([1, 2], [0, 1]), ([0, 2], [1, 1]), ([1, 2], [1, np.nan])]
)
def test_log_slope_refusals(x, y) -> None:
    with pytest.raises(InputError, match=r"^a log-log slope needs at least two points, none of them 0$"):
        log_slope(x, y)


# --- shares of variance


def factorial(*sizes: int, copies: int = 1) -> np.ndarray:
    """Levels [factor, setting] of all combinations."""
    return np.array(list(itertools.product(*map(range, sizes))) * copies).T


def shares(levels: np.ndarray, values: np.ndarray, draws: int = 1) -> dict[str, float]:
    named = {f"x{number}": column.tolist() for number, column in enumerate(levels, 1)}
    return {name: share.value for name, share in variance_shares(named, values, draws).items()}


def test_shares_are_sobol_indices() -> None:
    """Of y = a x1 + b x2 + noise: a^2 var x1, b^2 var x2 and the noise, over their sum, from 400 x 10 runs."""
    levels, noise = factorial(20, 20), 8.0
    rng = np.random.default_rng(0)
    values = (3 * levels[0] - levels[1])[:, None] + rng.normal(0, noise, (400, 10))
    variances = np.array([9 * 133 / 4, 133 / 4, 0, noise**2])  # of 0..19: (20^2 - 1) / 12
    actual = shares(levels, values)
    assert list(actual) == ["x1", "x2", "together", "seed"]
    # The noise's share has a standard error of sqrt(2 / 3600) of itself, those of x1 and x2
    # 2 sqrt(share noise / 4000), so none of them has more than 0.01.
    np.testing.assert_allclose([*actual.values()], variances / variances.sum(), rtol=0, atol=0.04)


def test_intervals_of_a_large_design() -> None:
    levels = factorial(4, 3, copies=60)
    rng = np.random.default_rng(0)
    means = levels[0] + 2 * levels[1] + levels[0] * (levels[1] == 1)
    values = means[:, None] + rng.normal(0, 1, (720, 3))
    named = {"x1": levels[0].tolist(), "x2": levels[1].tolist()}
    estimated = variance_shares(named, values, 200)
    for share in estimated.values():
        assert share.low < share.value < share.high
        assert share.high - share.low < 0.2
    assert variance_shares(named, values, 200) == estimated


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 4), st.integers(2, 4))
def test_shares_of_any_values(seed: int, seeds: int, first: int, second: int) -> None:
    """They sum to 1, and do not change with the unit, the order of settings or the names of levels."""
    rng = np.random.default_rng(seed)
    levels = factorial(first, second, copies=2)
    values = rng.normal(size=(levels.shape[1], seeds)) + levels[0][:, None]
    expected = shares(levels, values)
    assert sum(expected.values()) == pytest.approx(1)
    order = rng.permutation(len(values))
    assert shares(levels, 7 - 3 * values) == pytest.approx(expected)
    assert shares(levels[:, order], values[order]) == pytest.approx(expected)
    assert shares(-levels, values) == pytest.approx(expected)
    assert shares(levels[::-1], values) == pytest.approx({**expected, "x1": expected["x2"], "x2": expected["x1"]})


def null_shares(designs, factor: str, seeds: int) -> np.ndarray:
    """Shares of a factor without effect, over draws of the noise; y = 3 x1 + noise."""
    rng = np.random.default_rng(1)
    return np.array(
        [
            shares(levels, 3 * levels[0][:, None] + rng.normal(0, 2, (levels.shape[1], seeds)))[factor]
            for levels in designs
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_factor_without_effect(seeds: int) -> None:
    found = null_shares([factorial(3, 6)] * 400, "x2", seeds)
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean()) < 4 * error
    assert error < 0.005


def test_factor_without_effect_in_a_drawn_design() -> None:
    """Settings drawn as by `experiments.mnist_factorial.combinations`."""
    rng = np.random.default_rng(0)
    columns = np.arange(32) % 3, np.arange(32) % 6
    designs = [np.stack([rng.permutation(column) for column in columns]) for _ in range(400)]
    found = null_shares(designs, "x2", 3)
    assert abs(found.mean()) < 4 * found.std(ddof=1) / np.sqrt(len(found))


def test_interaction_alone() -> None:
    levels = 2 * factorial(2, 2, copies=100) - 1
    actual = shares(levels, (levels[0] * levels[1]).astype(float)[:, None].repeat(2, axis=1))
    assert actual == pytest.approx({"x1": 0, "x2": 0, "together": 1, "seed": 0}, abs=0.01)  # 1 / 400 each


def test_interaction_alone_in_a_complete_design() -> None:
    levels = 2 * factorial(2, 2) - 1
    actual = shares(levels, (levels[0] * levels[1]).astype(float)[:, None].repeat(2, axis=1))
    assert actual == pytest.approx({"x1": 0, "x2": 0, "together": 1, "seed": 0}, abs=0.01)


def test_seed_alone() -> None:
    """400 x 5 runs: the share of seeds has a standard error of sqrt(2 / 400) / 5, that of x1 one of 1 / 1000."""
    values = np.random.default_rng(2).normal(size=(400, 5))
    actual = shares(factorial(2, 2, copies=100), values)
    assert actual == pytest.approx({"x1": 0, "x2": 0, "together": 0, "seed": 1}, abs=0.06)


def test_one_seed_a_setting() -> None:
    """Noise cannot be told from what factors do together."""
    levels = factorial(10, 10)
    noise = np.random.default_rng(3).normal(size=100)
    actual = shares(levels, (levels[0] + noise)[:, None])
    assert actual["seed"] == 0
    part = 8.25 / 9.25
    assert actual == pytest.approx({"x1": part, "x2": 0, "together": 1 - part, "seed": 0}, abs=0.06)


def test_levels_are_told_apart_by_name() -> None:
    values = np.random.default_rng(4).normal(size=(6, 2))
    named = [variance_shares({"x": x}, values, 1) for x in ([None, 0, 1.5] * 2, ["a", "b", "c"] * 2)]
    assert named[0] == named[1]


@pytest.mark.parametrize(("value", "seeds"), [(0.5, 1), (0.5, 3), (0.1, 3)])
def test_constant_values(value: float, seeds: int) -> None:
    estimated = variance_shares({"x": [0, 1, 0, 1]}, np.full((4, seeds), value), 20)
    assert np.isnan([tuple(share) for share in estimated.values()]).all()


@pytest.mark.parametrize("name", ["seed", "together"])
def test_factor_with_a_name_taken(name: str) -> None:
    with pytest.raises(InputError):
        variance_shares({name: [0, 1, 0, 1]}, np.arange(8.0).reshape(4, 2), 1)


@pytest.mark.parametrize(
    ("levels", "settings"), [({"x": [0]}, 1), ({}, 0), ({"x": [0, 1]}, 3), ({"x": [0, 1, 0], "y": [0, 1]}, 3)]
)
def test_variance_shares_refusals(levels, settings: int) -> None:
    message = rf"^shares of variance need a level of every factor for each of at least two settings: {settings}$"
    with pytest.raises(InputError, match=message):
        variance_shares(levels, np.zeros((settings, 2)))


# --- matrices of runs and questions


def by_hand(matrices: np.ndarray) -> tuple[float, float]:
    """The statistic and p over all permutations within groups, one by one."""
    groups, n, _ = matrices.shape

    def statistic(orders: tuple) -> float:
        pairs = list(itertools.product(range(n), repeat=2))
        beside = [m[i, j] for m, o in zip(matrices, orders, strict=True) for i, j in pairs if j != o[i]]
        own = [m[i, o[i]] for m, o in zip(matrices, orders, strict=True) for i in range(n)]
        return float(np.mean(own) - np.mean(beside))

    found = statistic(tuple(range(n) for _ in range(groups)))
    every = itertools.product(itertools.permutations(range(n)), repeat=groups)
    others = [statistic(orders) for orders in every]
    return found, float(np.mean([other >= found - 1e-9 for other in others]))


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 3), (3, 2)])
def test_matrix_test_by_hand(shape: tuple[int, int]) -> None:
    groups, n = shape
    matrices = np.random.default_rng(0).random((groups, n, n)) + np.eye(n) * 0.3
    statistic, p = by_hand(matrices)
    assert matrix_test(matrices) == pytest.approx((statistic, p))


def test_matrix_test_of_a_diagonal() -> None:
    assert matrix_test(np.eye(4)[None]) == pytest.approx((1, 1 / 24))
    assert matrix_test(np.ones((2, 3, 3))) == pytest.approx((0, 1))


def test_matrix_test_at_random() -> None:
    matrices = np.eye(8)[None].repeat(2, 0)
    assert matrix_test(matrices, draws=500).p == pytest.approx(1 / 501)
    noise = [matrix_test(np.random.default_rng(seed).random((2, 8, 8)), draws=200).p for seed in range(200)]
    # Uniform under the null hypothesis: 5 standard errors of its mean.
    assert abs(np.mean(noise) - 0.5) < 5 * np.sqrt(1 / 12 / 200)


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 2), (1, 2, 3), (1, 1, 1)])
def test_matrix_test_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^a matrix test needs square matrices of at least 2 x 2, got shape "):
        matrix_test(np.zeros(shape))
