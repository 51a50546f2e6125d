"""Prompt look-up: draft what followed the last few tokens where they stood before."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.drafter import NOTHING, Groups, Proposal, is_token

NAME = "lookup"
ORDERS = (8, 5, 3, 2)  # lengths of the n-grams looked for, the longest first
NOWHERE = -1
MOST = 64  # drafts; verification pays for far fewer


class LookupDrafter:
    """An index of a sequence's n-grams, which grows with it; a text costs the same per token however long it is.

    Of the n-grams of the longest order that stood before it takes the most recent one. Drafts go on from themselves
    where they reach the end, so that a text that repeats itself is drafted at any length.
    """

    name = NAME

    def __init__(self) -> None:
        """Start with no tokens."""
        self._token_ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # by n-gram, where the token after it stands
        self._before: list[tuple[int, ...]] = []  # by token, the places that those of n-grams ending there replaced

    @property
    def token_ids(self) -> Sequence[int]:
        """See `Drafter`."""
        return self._token_ids

    def add(self, token_ids: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """See `Drafter`."""
        for token_id in token_ids:
            self._token_ids.append(token_id)
            place = len(self._token_ids)
            grams = self._grams(self._token_ids)
            self._before.append(tuple(self._places.get(gram, NOWHERE) for gram in grams))
            self._places.update(dict.fromkeys(grams, place))

    def forget(self, count: int) -> None:
        """See `Drafter`."""
        for _ in range(count):
            for gram, place in zip(self._grams(self._token_ids), self._before.pop(), strict=True):
                if place == NOWHERE:
                    del self._places[gram]
                else:
                    self._places[gram] = place
            self._token_ids.pop()

    def propose(self, token_id: int) -> Proposal:
        """See `Drafter`; the grade is the length of the n-gram that was found."""
        for gram in self._grams([*self._token_ids[1 - max(ORDERS) :], token_id]):
            if (place := self._places.get(gram, NOWHERE)) != NOWHERE:
                return self._proposal(token_id, place, len(gram))
        return NOTHING

    def _grams(self, token_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the n-grams at the end, the longest first."""
        return [tuple(token_ids[-order:]) for order in ORDERS if order <= len(token_ids)]

    def _proposal(self, token_id: int, place: int, order: int) -> Proposal:
        def draw(count: int) -> Groups:
            following = [*self._token_ids[place : place + count], token_id][:count]
            period = len(self._token_ids) + 1 - place
            while len(following) < count:
                following.append(following[-period])
            yield list(itertools.takewhile(is_token, following))

        return Proposal(most=MOST, grade=order, draw=draw)
