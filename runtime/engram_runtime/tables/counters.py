"""What a table was asked for, and what that took."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

FEW_ROWS = 256  # up to here a set of Python's counts faster than numpy


@dataclass(slots=True, kw_only=True)
class TableCounters:
    """Sums since the table was opened.

    Attributes:
        rows: row ids asked for.
        unique: distinct ones, counted batch by batch.
        bytes: of the records of the distinct ones.
        cold: distinct records that were not known to be in memory, so that the disk was asked for them.
        wait_s: seconds spent in asking for the cold ones and in waiting until they were in memory, as callers of
            `gather` felt it: nothing where none was cold.
    """

    rows: int = 0
    unique: int = 0
    bytes: int = 0
    cold: int = 0
    wait_s: float = 0.0

    def count(self, row_ids: NDArray[np.int64], record_bytes: int, cold: int, wait_s: float) -> None:
        """Add a batch of ``[N]`` row ids."""
        unique = count_distinct(row_ids)
        self.rows += len(row_ids)
        self.unique += unique
        self.bytes += unique * record_bytes
        self.cold += cold
        self.wait_s += wait_s

    def __sub__(self, earlier: Self) -> Self:
        """Return what was added since ``earlier``."""
        differences = {each.name: getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)}
        return type(self)(**differences)


def count_distinct(values: NDArray[np.int64]) -> int:
    """Return how many different values, none negative, there are in ``[N]``."""
    if len(values) <= FEW_ROWS:
        return len(set(values.tolist()))
    # Every value writes its place to a slot that equal values share; of those that find an equal one's place there,
    # the one that finds its own is counted. Others share a slot with a different value. Half the time of a sort.
    slots = np.empty(4 << len(values).bit_length(), dtype=np.int32)
    places = np.arange(len(values), dtype=np.int32)
    slot = values & (len(slots) - 1)
    slots[slot] = places
    winners = slots.take(slot, mode="clip")
    others = values[values.take(winners, mode="clip") != values]
    return int(np.count_nonzero(winners == places)) + len(set(others.tolist()))
