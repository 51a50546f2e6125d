"""The interval of a ratio of perplexities."""

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED = 10_000, 0


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
