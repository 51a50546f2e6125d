"""Intervals that hold what was measured in 95 of 100 repetitions."""

import math

import numpy as np
from numpy.typing import NDArray

NORMAL_975 = 1.959963984540054  # quantile of the standard normal distribution
RESAMPLES, SEED = 10_000, 0


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927); unlike the normal one it holds near 0 and 1."""
    share, squared = successes / trials, NORMAL_975**2
    centre = share + squared / (2 * trials)
    half = NORMAL_975 * math.sqrt(share * (1 - share) / trials + squared / (4 * trials**2))
    scale = 1 + squared / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


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
