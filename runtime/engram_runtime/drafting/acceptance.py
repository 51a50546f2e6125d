"""Choose the token after each verified row, so that text has the distribution of plain decoding whatever is drafted.

    x ~ p, accepted where x is the draft                            drafts that are certain, which p needn't know of
    d with min(1, p(d) / q(d)), else x ~ max(0, p - q) normalised   d drawn from q

Both give p: the second as min(p, q) + max(0, p - q) = p. See Leviathan et al., arXiv 2211.17192, and Chen et al.,
arXiv 2302.01318.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.drafter import Draft, Odds
from engram_runtime.sampling import Sampler, SamplingOptions, distribution, draw, finite

Choice = Callable[[NDArray[np.float32], Sequence[int], Draft | None], int]
"""Takes logits ``[V]``, the token ids before and what was drafted here, if anything; returns the token.

The draft is accepted where it is that token.
"""


def by_sampling(sample: Sampler) -> Choice:
    """Draw as without drafts: the text of a seed is that of plain decoding, and greedy text is the likeliest.

    Drafts must be certain: one that was drawn and is accepted only where the sampler agrees is accepted too seldom.
    """
    return lambda logits, token_ids, drafted: sample(logits, token_ids)


def by_rejection(options: SamplingOptions) -> Choice:
    """Accept drafts by their odds. Text has the distribution of plain decoding, but not its draws.

    It owns a random generator: make one per sequence. The temperature must be above 0.
    """
    rng = np.random.Generator(np.random.PCG64(options.seed))

    def choose(logits: NDArray[np.float32], token_ids: Sequence[int], drafted: Draft | None) -> int:
        kept_ids, weights = distribution(finite(logits), token_ids, options)
        if drafted is None or drafted.odds is None:
            return draw(kept_ids, weights, rng)
        return accept_or_redraw(Odds(kept_ids, weights / weights.sum()), drafted.token_id, drafted.odds, rng)

    return choose


def accept_or_redraw(wanted: Odds, token_id: int, drafted: Odds, rng: np.random.Generator) -> int:
    """Return ``token_id``, which was drawn from ``drafted``, or another token, so that it has the odds ``wanted``."""
    if rng.random() * _probability(drafted, token_id) < _probability(wanted, token_id):
        return token_id
    left = wanted.probabilities.copy()
    places = np.searchsorted(wanted.token_ids, drafted.token_ids)
    places[places == len(left)] = 0
    shared = wanted.token_ids[places] == drafted.token_ids
    np.subtract.at(left, places[shared], drafted.probabilities[shared])
    np.maximum(left, 0, out=left)
    # Nothing is left of odds that differ by rounding alone.
    return draw(wanted.token_ids, left, rng) if left.any() else token_id


def _probability(odds: Odds, token_id: int) -> float:
    return float(odds.probabilities[odds.token_ids == token_id].sum())
