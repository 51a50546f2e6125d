"""Drafts among siblings: what one text went on with is guessed of another that ends the same way."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from engram_runtime.drafting.drafter import is_token
from engram_runtime.drafting.lookup import ORDERS

Gram = tuple[int, ...]


class SiblingDrafter(Protocol):
    """Guesses what follows texts that it is told of as they grow."""

    def add(self, text: list[int], count: int) -> None:
        """Take note of the last ``count`` tokens of a text, which is the caller's list and goes on growing."""
        ...

    def drafts(self, texts: Sequence[list[int]], most: Sequence[int], spare: int) -> list[list[int]]:
        """Return drafts after each text, up to ``most`` of its own and ``spare`` of all of them."""
        ...


class SiblingLookup:
    """An index of the n-grams of all texts; see `engram_runtime.drafting.lookup.LookupDrafter`.

    Of the n-grams of the longest order that stood in any of the texts it takes the most recent one.
    """

    def __init__(self) -> None:
        """Start with no texts."""
        self._places: dict[Gram, tuple[list[int], int]] = {}  # by n-gram, where a token after it stands

    def add(self, text: list[int], count: int) -> None:
        """See `SiblingDrafter`."""
        for place in range(len(text) - count, len(text)):
            self._places.update(dict.fromkeys(_grams(text, place), (text, place)))

    def drafts(self, texts: Sequence[list[int]], most: Sequence[int], spare: int) -> list[list[int]]:
        """See `SiblingDrafter`: first drafts of all texts come before second ones, those of longer n-grams first."""
        if spare < 1:
            return [[] for _ in texts]
        found = [self._following(text, min(count, spare)) for text, count in zip(texts, most, strict=True)]
        ranked = sorted(
            (place, -order, index) for index, (order, drafts) in enumerate(found) for place in range(len(drafts))
        )
        counts = Counter(index for _, _, index in ranked[:spare])
        return [drafts[: counts[index]] for index, (_, drafts) in enumerate(found)]

    def _following(self, text: list[int], count: int) -> tuple[int, list[int]]:
        """Return up to ``count`` tokens that may follow a text, and the length of the n-gram they followed before."""
        for gram in _grams(text, len(text)):
            if gram in self._places:
                other, place = self._places[gram]
                return len(gram), list(itertools.takewhile(is_token, other[place : place + count]))
        return 0, []


def _grams(text: Sequence[int], end: int) -> Iterator[Gram]:
    """Yield the n-grams that end before ``end``, the longest first."""
    return (tuple(text[end - order : end]) for order in ORDERS if order <= end)
