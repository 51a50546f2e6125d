"""What a table was asked for, and what that took."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.tables.row_ids import count_distinct


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
        early: distinct rows, draft by draft, that a sequence had fetched before it was known that their tokens come.
        early_used: those of them that a pass then read, be it for tokens that were rejected.
        early_ready: those of these that were there when that pass began.
    """

    rows: int = 0
    unique: int = 0
    bytes: int = 0
    cold: int = 0
    wait_s: float = 0.0
    early: int = 0
    early_used: int = 0
    early_ready: int = 0

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

    def __add__(self, other: Self) -> Self:
        """Return what both counted."""
        return type(self)(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})
