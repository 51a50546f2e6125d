"""A draft head as a drafter: a chain of guesses from the model's own hidden states."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.draft_head import Drafted, DraftHead
from engram_runtime.drafting.drafter import NOTHING, Groups, Proposal, is_token

NAME = "mtp"
MOST = 64  # drafts; verification pays for far fewer
MOST_KEPT = 64  # tokens of a long text that the head sees the end of: all of them would take as long as some passes
MOST_WAITING = 8  # states that are entered with the next draft; those before are left out
CHAIN = 0  # the one grade
LEAST_LIKELY = 0.25  # of all drafts so far, by the head, to make one more: it is right less than half as often

_State = tuple[int, NDArray[np.float32]]  # a place in the text and the model's hidden state there


class HeadDrafter:
    """Drafts with a `DraftHead`, one token after another.

    The head gets an entry for each position whose hidden state is known, once the token after it is: those of confirmed
    tokens together with the first draft after them. Entries made for drafts are forgotten. Positions whose states are
    gone, long before the end or forgotten in between, are left out; rotations only tell distances.
    """

    name = NAME

    def __init__(self, head: DraftHead) -> None:
        """Start with no tokens."""
        self._head = head
        self._token_ids: list[int] = []
        self._waiting: list[_State] = []
        self._entered: list[int] = []  # places that the head has entries of

    @property
    def token_ids(self) -> Sequence[int]:
        """See `Drafter`."""
        return self._token_ids

    def add(self, token_ids: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """See `Drafter`; of a long text the head gets the entries at once, rather than with its next draft."""
        self._token_ids += token_ids
        known = min(len(hidden), len(token_ids), MOST_KEPT)
        self._waiting += enumerate(hidden[len(hidden) - known :].copy(), start=len(self._token_ids) - known)
        if known > MOST_WAITING:
            self._enter(self._waiting[:-1], [])
            del self._waiting[:-1]
        del self._waiting[:-MOST_WAITING]

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
            drafted = self._enter(self._waiting, [token_id])
            assert drafted is not None  # the entry of the last state is among them
            self._waiting = []
            kept = len(self._head)
            try:
                likely = 1.0
                for number in itertools.count(1):
                    yield [draft := int(self._head.vocabulary[drafted.logits[-1].argmax()])]
                    likely *= _top_probability(drafted.logits[-1])
                    if number == count or likely < LEAST_LIKELY:
                        return
                    drafted = self._head.extend([draft], drafted.hidden[-1:])
            finally:
                self._head.trim(len(self._head) - kept)

        return Proposal(most=MOST, grade=CHAIN, draw=draw_chain)

    def _enter(self, waiting: Sequence[_State], pending: Sequence[int]) -> Drafted | None:
        """Make entries of states whose next token is one; ``pending`` are tokens after all it was told of."""
        first = waiting[0][0] + 1
        following = [*self._token_ids[first:], *pending]
        entries = [(place, following[place + 1 - first], state) for place, state in waiting]
        entries = [entry for entry in entries if is_token(entry[1])]
        if not entries:
            return None
        places, token_ids, states = zip(*entries, strict=True)
        drafted = self._head.extend(token_ids, np.stack(states))
        self._entered += places
        return drafted


def _top_probability(logits: NDArray[np.float32]) -> float:
    """Return the softmax of the largest of ``logits [n]``."""
    return 1 / float(np.exp(logits - logits.max()).sum())
