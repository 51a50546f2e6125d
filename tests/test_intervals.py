"""Intervals: published values, brute force, and what must hold whatever is measured."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_runtime.evaluation.intervals import Estimate, ratio_of_runs, ratio_of_sums, share

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


def test_the_bootstrap_of_a_mean_is_as_wide_as_the_normal_interval() -> None:
    values = np.random.default_rng(3).standard_normal(400)
    found = ratio_of_sums(values, np.ones(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=2, max_size=20))
def test_a_ratio_of_sums_lies_among_those_of_its_units(units: list[tuple[float, int]]) -> None:
    sums, counts = (np.array(column, dtype=np.float64) for column in zip(*units, strict=True))
    found = ratio_of_sums(sums, counts)
    assert found.low is not None
    assert found.high is not None
    ratios = sums / counts
    assert ratios.min() - 1e-9 <= found.low <= found.high <= ratios.max() + 1e-9
    assert found == ratio_of_sums(sums, counts)


def test_one_unit_has_no_interval_and_says_so() -> None:
    found = ratio_of_sums(np.array([3.0]), np.array([2.0])).map(math.exp)
    assert found == Estimate(value=math.exp(1.5), low=None, high=None)
    assert f"{found:.2f}" == "4.48 (too little for an interval)"
    assert not found.excludes(1.0)


def test_estimates_are_written_with_their_ends() -> None:
    found = Estimate(value=1.0, low=0.5, high=2.0)
    assert f"{found.map(lambda value: 10 * value):.1f}" == "10.0 (5.0 to 20.0)"
    assert [found.excludes(value) for value in (0.4, 0.5, 1.0, 2.1)] == [True, False, False, True]
