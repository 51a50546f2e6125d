"""Hit rate of an LRU cache against its size, from a sequence of accesses: exact, or of a sample of the things."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.lens.mixing import in_sample, mixed_bits
from engram_runtime.lens.stack_distances import FIRST_TOUCH, Progress, no_progress, stack_distances

EXACT_ACCESSES = 4_000_000  # about 5 s and 400 MB; longer sequences are sampled down to as many


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MissRatioCurve:
    """What LRU caches of any size would serve of a sequence of accesses.

    Attributes:
        accesses: in the sequence, at least one.
        rate: share of the things that was looked at, in (0, 1]; 1 is exact.
        sampled: accesses of those.
        distances: of those that are not first touches, ascending.
    """

    accesses: int
    rate: float
    sampled: int
    distances: NDArray[np.int64]

    @property
    def distinct(self) -> int:
        """Things accessed; estimated below rate 1."""
        return round((self.sampled - len(self.distances)) / self.rate)

    @property
    def first_touches(self) -> float:
        """Share of the accesses that are the first one of their thing: no cache serves them."""
        return min(1.0, (self.sampled - len(self.distances)) / (self.accesses * self.rate))

    @property
    def ceiling(self) -> float:
        """Share of the accesses that a cache of any size serves at most."""
        return 1 - self.first_touches

    def hit_rates(self, capacities: Sequence[int]) -> list[float]:
        """Return the share of the accesses that caches of so many things serve.

        Below rate 1 that is within 0.02 for caches that hold 16 things of the sample, and a guess for smaller ones.
        """
        reached = np.asarray(capacities, dtype=np.float64) * self.rate
        hits = np.searchsorted(self.distances, reached, side="left")
        # What the sample has in accesses too many or too few counts as hits of the smallest cache (SHARDS-adj).
        rates = 1 - (self.sampled - hits) / (self.accesses * self.rate)
        within: list[float] = rates.clip(0, self.ceiling).tolist()
        return within


def sample_rate(accesses: int) -> float:
    """Return the share of things to look at so that about `EXACT_ACCESSES` accesses are left."""
    return min(1.0, EXACT_ACCESSES / accesses)


def miss_ratio_curve(
    blocks: Iterable[NDArray[np.signedinteger[Any]]], rate: float = 1.0, progress: Progress = no_progress
) -> MissRatioCurve:
    """Return the curve of a sequence that comes in blocks of ids ``[n]``.

    Below rate 1 things are sampled by their hash, with all their accesses, and distances scaled by 1 / rate: SHARDS
    with a fixed rate, Waldspurger et al., FAST 2015.

    Args:
        progress: see `stack_distances`.
    """
    accesses, kept = 0, []
    for block in blocks:
        accesses += len(block)
        kept.append(block if rate == 1 else block[in_sample(mixed_bits(block.astype(np.uint64)), rate)])
    distances = stack_distances(np.concatenate(kept), progress)
    again = np.sort(distances[distances != FIRST_TOUCH])
    return MissRatioCurve(accesses=accesses, rate=rate, sampled=len(distances), distances=again)
