"""LRU stack distances of a sequence of accesses, exact, in numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST_TOUCH = -1  # in place of a distance where a thing is accessed for the first time

Progress = Callable[[float], None]  # told the share of the work that is done since it was told last


def no_progress(share: float) -> None:
    """Be told of work that is done, and do nothing."""


def stack_distances(ids: NDArray[np.signedinteger[Any]], progress: Progress = no_progress) -> NDArray[np.int64]:
    """Return ``[N]``: how many other things were accessed since this one of ``[N]`` ids was, or `FIRST_TOUCH`.

    An access hits an LRU cache of c things where its distance is below c (Mattson et al., IBM Systems Journal 1970).
    Takes about 10 arrays of N int64 and N log2(N) steps.
    """
    earlier = _previous(ids)
    again = earlier >= 0
    # Between accesses p and i of one thing lie as many others as places j in (p, i) whose own thing was last seen
    # before p. That holds of all places up to p, so p + 1 are taken off what `_smaller_before` counts from the start.
    ranks = np.empty(len(ids), dtype=np.int64)
    num_first = len(ids) - int(again.sum())
    ranks[~again] = np.arange(num_first)
    seen_again = np.zeros(len(ids), dtype=np.bool_)
    seen_again[earlier[again]] = True
    ranks[again] = num_first - 1 + np.cumsum(seen_again)[earlier[again]]
    distances = _smaller_before(ranks, progress) - earlier - 1
    distances[~again] = FIRST_TOUCH
    return distances


def _previous(ids: NDArray[np.signedinteger[Any]]) -> NDArray[np.int64]:
    """Return the place ``[N]`` where each id stood last, or -1."""
    order = np.argsort(ids, kind="stable")
    same = ids[order[1:]] == ids[order[:-1]]
    previous = np.full(len(ids), -1, dtype=np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def _smaller_before(ranks: NDArray[np.int64], progress: Progress) -> NDArray[np.int64]:
    """Return ``[N]``: how many smaller values stand before each one of a permutation of 0 to N - 1.

    Sorts by one bit after the other, highest first. Two values are told apart by the highest bit in which they differ,
    so at each bit a value with a one gains the zeros before it among those equal in all higher bits; of a permutation
    these stand from ``base`` on, the value with all lower bits zero.
    """
    values, counts = ranks, np.zeros(len(ranks), dtype=np.int64)
    places = np.arange(len(ranks))
    bits = max(len(ranks) - 1, 0).bit_length()
    for bit in reversed(range(bits)):
        ones = (values >> bit & 1).astype(np.bool_)
        zeros_before: NDArray[np.int64] = np.cumsum(~ones) - ~ones
        base = values >> bit + 1 << bit + 1
        zeros: NDArray[np.int64] = zeros_before - zeros_before[base]
        counts += np.where(ones, zeros, 0)
        target = np.where(ones, places - zeros + (1 << bit), base + zeros)
        values, counts = _moved(values, target), _moved(counts, target)
        progress(1 / bits)
    return counts[ranks]


def _moved(values: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
    moved = np.empty_like(values)
    moved[target] = values
    return moved
