"""Intervals that hold what was measured in 95 of 100 repetitions."""

import math

import numpy as np
from numpy.typing import NDArray

NORMAL_975 = 1.959963984540054  # quantile of the standard normal distribution
MOST_STUDENT_975, STUDENT_PRECISION = 12.8, 1e-9  # with one degree of freedom it is 12.706
RESAMPLES, SEED = 10_000, 0


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927); unlike the normal one it holds near 0 and 1."""
    share, squared = successes / trials, NORMAL_975**2
    centre = share + squared / (2 * trials)
    half = NORMAL_975 * math.sqrt(share * (1 - share) / trials + squared / (4 * trials**2))
    scale = 1 + squared / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


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


def perplexity_ratio(
    losses: NDArray[np.float64], others: NDArray[np.float64], tokens: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Return perplexity over another one on the same passages, and its paired bootstrap percentile interval.

    Args:
        losses: ``[P]``, of each passage the sum over its tokens, in nats.
        others: ``[P]``, the same under the other condition.
        tokens: ``[P]``; passages are what is drawn again, since tokens of one are not independent.
    """
    drawn = np.random.default_rng(SEED).integers(0, len(tokens), size=(RESAMPLES, len(tokens)))
    differences = (losses - others)[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.quantile(np.exp(differences), [0.025, 0.975])
    return float(np.exp((losses - others).sum() / tokens.sum())), float(low), float(high)
