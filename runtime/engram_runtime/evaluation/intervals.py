"""Figures with intervals that hold the true value in 95 of 100 repetitions where their units are independent."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

NORMAL_975 = 1.959963984540054  # quantile of the standard normal distribution
LARGEST_EXPONENT = 709.0  # of e, in float64
MOST_STUDENT_975, STUDENT_PRECISION = 12.8, 1e-9  # with one degree of freedom it is 12.706


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and the ends of its 95 % interval, both None where too little was measured to tell."""

    value: float
    low: float | None
    high: float | None

    def exp(self) -> Self:
        """Return the estimate of e to the power of the figure; where float64 ends, so do powers."""
        low, high = (None if end is None else _power(end) for end in (self.low, self.high))
        return type(self)(value=_power(self.value), low=low, high=high)

    def excludes(self, value: float) -> bool:
        """Whether a value is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    def __format__(self, spec: str) -> str:
        """Write the figure and its ends, each by ``spec``."""
        if self.low is None or self.high is None:
            return f"{self.value:{spec}} (too little for an interval)"
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def _power(exponent: float) -> float:
    return math.exp(min(exponent, LARGEST_EXPONENT))


def share(successes: int, trials: int) -> Estimate:
    """Return a share with its score interval (Wilson 1927); unlike the normal one it holds near 0 and 1."""
    value, squared = successes / trials, NORMAL_975**2
    centre = value + squared / (2 * trials)
    half = NORMAL_975 * math.sqrt(value * (1 - value) / trials + squared / (4 * trials**2))
    scale = 1 + squared / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    return Estimate(value=value, low=max(0.0, min(low, value)), high=min(1.0, max(high, value)))  # rounding may pass 1


def share_difference(gained: int, lost: int, trials: int) -> Estimate:
    """Return how much larger a share is than another one of the same trials (Agresti & Min 2005).

    Half a trial is added to each of the four kinds for the interval, so that it has a width where nothing changed.

    Args:
        gained: trials that the first share counts and the second one doesn't.
        lost: trials that the second one counts alone.
    """
    more, less = (gained + 0.5) / (trials + 2), (lost + 0.5) / (trials + 2)
    half = NORMAL_975 * math.sqrt((more + less - (more - less) ** 2) / (trials + 2))
    return Estimate(
        value=(gained - lost) / trials, low=max(-1.0, more - less - half), high=min(1.0, more - less + half)
    )


def ratio_of_sums(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> Estimate:
    """Return sum over sum with Student's interval, to first order in what units differ by (batch means).

    Args:
        numerators: ``[U]``, one for each unit: a piece of text, a question. Whatever depends on one another must be one
            unit. Differences of two conditions make the interval a paired one.
        denominators: ``[U]``: how many tokens, bytes or questions a unit holds.
    """
    units, total = len(numerators), denominators.sum()
    value = float(numerators.sum() / total)
    if units < 2:
        return Estimate(value=value, low=None, high=None)
    residuals = numerators - value * denominators
    error = math.sqrt(units / (units - 1) * float(residuals @ residuals)) / total
    half = student_975(units - 1) * error
    return Estimate(value=value, low=float(value - half), high=float(value + half))


def ratio_of_runs(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return how many times ``first`` ``second`` is, both positive, measured apart from one another.

    The median of all ratios (Hodges & Lehmann 1963) and the interval of the rank test (Mann & Whitney 1947), which
    assumes no distribution; it takes four rounds of each to have one.
    """
    ratios = np.sort(np.divide.outer(np.array(second), np.array(first)).ravel())
    skipped = _rank_sums_below(len(first), len(second))
    ends = (float(ratios[skipped - 1]), float(ratios[-skipped])) if skipped else (None, None)
    return Estimate(value=float(np.median(ratios)), low=ends[0], high=ends[1])


@functools.cache
def _rank_sums_below(first: int, second: int) -> int:
    """Return how many of the least values of Mann and Whitney's U have a probability of at most 2.5 % together."""
    arrangements = [1] + [0] * (first * second)  # by U; the Gaussian binomial coefficient, factor by factor
    for size in range(1, first + 1):
        for u in range(len(arrangements) - 1, second + size - 1, -1):
            arrangements[u] -= arrangements[u - second - size]
        for u in range(size, len(arrangements)):
            arrangements[u] += arrangements[u - size]
    total = math.comb(first + second, first)
    return sum(40 * below <= total for below in itertools.accumulate(arrangements))


def student_975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's distribution, of which `NORMAL_975` is the limit.

    The probability between -t and t is a finite sum where the degrees are whole (Abramowitz & Stegun 26.7.3, 26.7.4).
    """
    low, high = 0.0, MOST_STUDENT_975
    while high - low > STUDENT_PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees) < 0.95 else (low, middle)
    return high


def _student_within(t: float, degrees: int) -> float:
    angle = math.atan(t / math.sqrt(degrees))
    term = total = math.cos(angle) if degrees % 2 else 1.0
    for power in range(2 + degrees % 2, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (power - 1) / power
        total += term
    if degrees % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total * (degrees > 1))
