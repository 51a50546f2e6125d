"""A draft head as a drafter: a chain of guesses from the model's own hidden states."""

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.draft_head import Drafted, DraftHead
from engram_runtime.drafting.drafter import NOTHING, Draft, Groups, Odds, Proposal
from engram_runtime.sampling import SamplingOptions, distribution, draw

NAME = "mtp"
MOST = 64  # drafts; verification pays for far fewer
MOST_WAITING = 256  # hidden states kept for the next draft: older ones aren't worth the head's time or their memory
CHAIN = 0  # the one grade


class HeadDrafter:
    """Drafts with a `DraftHead`, one token after another.

    The head gets an entry for each position whose hidden state is known, once the token after it is: those of confirmed
    tokens together with the first draft after them. Entries made for drafts are forgotten. Positions whose states are
    gone, long before the end or forgotten in between, are left out; rotations only tell distances.
    """

    name = NAME

    def __init__(self, head: DraftHead, sampling: SamplingOptions | None = None) -> None:
        """Start with no tokens.

        Args:
            sampling: how to draw drafts, penalties left out; or None for the likeliest ones, as point masses.
        """
        self._head = head
        self._sampling = sampling
        self._rng = np.random.Generator(np.random.PCG64(None if sampling is None else sampling.seed)).spawn(1)[0]
        self._token_ids: list[int] = []
        self._waiting: deque[tuple[int, NDArray[np.float32]]] = deque(maxlen=MOST_WAITING)  # places and their states
        self._entered: list[int] = []  # places that the head has entries of

    def add(self, token_ids: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """See `Drafter`."""
        self._token_ids += token_ids
        known = min(len(hidden), len(token_ids), MOST_WAITING)
        place = len(self._token_ids) - known
        self._waiting.extend(enumerate(hidden[len(hidden) - known :].copy(), start=place))

    def forget(self, count: int) -> None:
        """See `Drafter`."""
        del self._token_ids[len(self._token_ids) - count :]
        kept = len(self._token_ids)
        while self._waiting and self._waiting[-1][0] >= kept:
            self._waiting.pop()
        # The entry of the last kept place was of a token that is forgotten.
        stale = sum(1 for place in reversed(self._entered[-count - 1 :]) if place >= kept - 1)
        del self._entered[len(self._entered) - stale :]
        self._head.trim(stale)

    def propose(self, token_id: int) -> Proposal:
        """See `Drafter`; no guess as long as no state is known of the token before."""
        if not self._waiting or self._waiting[-1][0] != len(self._token_ids) - 1:
            return NOTHING

        def draw_chain(count: int) -> Groups:
            drafted = self._enter(token_id)
            kept = len(self._head)
            try:
                for number in itertools.count(1):
                    yield [draft := self._draft(drafted)]
                    if number == count:
                        return
                    drafted = self._head.extend([draft.token_id], drafted.hidden[-1:])
            finally:
                self._head.trim(len(self._head) - kept)

        return Proposal(most=MOST, grade=CHAIN, draw=draw_chain)

    def _enter(self, token_id: int) -> Drafted:
        """Make entries of all states that wait; ``token_id`` follows the last."""
        places, states = zip(*self._waiting, strict=True)
        first = places[0] + 1
        following = [*self._token_ids[first:], token_id]
        drafted = self._head.extend([following[place + 1 - first] for place in places], np.stack(states))
        self._entered += places
        self._waiting.clear()
        return drafted

    def _draft(self, drafted: Drafted) -> Draft:
        logits = drafted.logits[-1]
        if self._sampling is None:
            return Draft(int(self._head.vocabulary[logits.argmax()]))
        kept, weights = distribution(logits, (), self._sampling)
        odds = Odds(self._head.vocabulary[kept], weights / weights.sum())
        return Draft(draw(odds.token_ids, odds.probabilities, self._rng), odds)
