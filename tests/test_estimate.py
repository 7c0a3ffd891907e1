import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, log_slope, paired_difference, t_interval

# Student (1908), doi 10.2307/2331554: hours of sleep gained with two drugs by the same ten patients.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
moderate = st.floats(-1e3, 1e3)


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


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("runs", [2, 5])
def test_coverage(level: float, runs: int) -> None:
    repeats = 2000
    samples = np.random.default_rng(1).normal(3.0, 2.0, (repeats, runs))
    hits = sum(abs(e.mean - 3.0) <= e.half_width for e in (t_interval(row, level) for row in samples))
    assert stats.binomtest(hits, repeats, level).pvalue > 1e-3


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
