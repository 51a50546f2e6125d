"""Intervals: published values, brute force, and what must hold whatever is measured."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_runtime.evaluation.intervals import (
    Estimate,
    ratio_of_runs,
    ratio_of_sums,
    share,
    share_difference,
    student_975,
)

POSITIVE = st.floats(0.01, 100)
RUNS = st.lists(POSITIVE, min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_shares_are_the_published_ones(successes: int, trials: int, low: float, high: float) -> None:
    """From Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17, 1998."""
    found = share(successes, trials)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_a_share_is_inside_its_interval_and_so_is_its_counterpart(pair: tuple[int, int]) -> None:
    found, other = share(*pair), share(pair[1] - pair[0], pair[1])
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low))


@given(st.integers(2, 500).flatmap(lambda trials: st.tuples(st.integers(1, trials - 1), st.just(trials))))
def test_at_the_ends_of_an_interval_the_share_is_just_what_a_score_test_rejects(pair: tuple[int, int]) -> None:
    found, trials = share(*pair), pair[1]
    for end in (found.low, found.high):
        assert end is not None
        assert abs(found.value - end) / math.sqrt(end * (1 - end) / trials) == pytest.approx(1.959963984540054)


@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.integers(0, n // 2), st.integers(0, n // 2), st.just(n))))
def test_differences_of_shares_mirror_and_have_a_width(changed: tuple[int, int, int]) -> None:
    gained, lost, trials = changed
    found, back = share_difference(gained, lost, trials), share_difference(lost, gained, trials)
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low < found.high <= 1
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_the_interval_of_a_difference_is_that_of_the_proposal() -> None:
    """Worked by hand: cells of (15 + 1/2) / 102 and (5 + 1/2) / 102 of Agresti & Min, Statistics in Medicine 24."""
    found = share_difference(15, 5, 100)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.01206, 0.18401), abs=1e-5)


def brute_force(first: int, second: int) -> int:
    """Count the lowest values of U that have at most 2.5 % of all arrangements together."""
    places = itertools.combinations(range(first + second), first)
    u = sorted(sum(chosen) - first * (first - 1) // 2 for chosen in places)
    return sum(sum(value <= most for value in u) <= 0.025 * len(u) for most in range(first * second + 1))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 3), (4, 4), (3, 5), (5, 3), (7, 7), (6, 9)])
def test_the_interval_of_runs_leaves_out_what_the_rank_test_does(first: int, second: int) -> None:
    rng = np.random.default_rng(0)
    before, after = rng.uniform(1, 2, first).tolist(), rng.uniform(1, 2, second).tolist()
    ratios = sorted(b / a for a in before for b in after)
    left_out = brute_force(first, second)
    found = ratio_of_runs(before, after)
    assert (found.low, found.high) == ((ratios[left_out - 1], ratios[-left_out]) if left_out else (None, None))
    assert found.value == np.median(ratios)


@given(RUNS, RUNS, POSITIVE)
def test_runs_the_other_way_round_or_in_another_unit_have_the_same_interval(
    first: list[float], second: list[float], factor: float
) -> None:
    found, back = ratio_of_runs(first, second), ratio_of_runs(second, first)
    if found.low is not None and found.high is not None:
        assert (back.low, back.high) == pytest.approx((1 / found.high, 1 / found.low))
        assert found.low <= found.value <= found.high
    other_unit = ratio_of_runs(first, [factor * value for value in second])
    assert other_unit.value == pytest.approx(factor * found.value)


def test_the_interval_of_a_mean_is_the_published_one() -> None:
    """Hours of sleep gained by ten patients: Student, The probable error of a mean, Biometrika 6, 1908."""
    hours = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    found = ratio_of_sums(hours, np.ones(10))
    assert (found.value, found.low, found.high) == pytest.approx((1.58, 0.7001, 2.4599), abs=5e-5)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (29, 2.045), (30, 2.042), (120, 1.980)],
)
def test_quantiles_of_students_distribution_are_the_published_ones(degrees: int, quantile: float) -> None:
    assert student_975(degrees) == pytest.approx(quantile, abs=6e-4)


def test_in_95_of_100_repetitions_an_interval_holds_the_ratio() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        counts = rng.integers(50, 150, size=12).astype(np.float64)
        held += not ratio_of_sums(2.5 * counts + 10 * rng.standard_normal(12), counts).excludes(2.5)
    assert 935 <= held <= 965  # three standard deviations are 21


def test_a_ratio_that_all_units_share_has_no_width() -> None:
    counts = np.array([10.0, 20.0, 30.0])
    found = ratio_of_sums(0.01 * counts, counts).exp()
    assert (found.value, found.low, found.high) == pytest.approx((math.exp(0.01),) * 3)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=2, max_size=20), st.floats(-3, 3))
def test_what_every_unit_has_more_of_moves_the_interval(units: list[tuple[float, int]], more: float) -> None:
    sums, counts = (np.array(column, dtype=np.float64) for column in zip(*units, strict=True))
    found, moved = ratio_of_sums(sums, counts), ratio_of_sums(sums + more * counts, counts)
    assert found.low is not None
    assert found.high is not None
    assert (moved.low, moved.value, moved.high) == pytest.approx(
        (found.low + more, found.value + more, found.high + more), abs=1e-5
    )


def test_one_unit_has_no_interval_and_says_so() -> None:
    found = ratio_of_sums(np.array([3.0]), np.array([2.0])).exp()
    assert found == Estimate(value=math.exp(1.5), low=None, high=None)
    assert f"{found:.2f}" == "4.48 (too little for an interval)"
    assert not found.excludes(1.0)


def test_ends_beyond_the_largest_float_stay_finite() -> None:
    found = ratio_of_sums(np.array([1.0, 200.0]), np.ones(2)).exp()
    assert found.high == math.exp(709)
    assert found.value == pytest.approx(math.exp(100.5))


def test_estimates_are_written_with_their_ends() -> None:
    found = Estimate(value=1.0, low=0.5, high=2.0)
    assert f"{found:.1f}" == "1.0 (0.5 to 2.0)"
    assert f"{found:+.0%}" == "+100% (+50% to +200%)"
    assert [found.excludes(value) for value in (0.4, 0.5, 1.0, 2.1)] == [True, False, False, True]
