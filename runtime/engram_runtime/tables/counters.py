"""What a table was asked for, and what that took."""

from dataclasses import dataclass, fields
from typing import Self


@dataclass(slots=True, kw_only=True)
class TableCounters:
    """Sums since the table was opened.

    Attributes:
        rows: row ids asked for.
        unique: distinct ones, counted batch by batch.
        bytes: of the records of the distinct ones.
        cold: distinct records that were not known to be in memory, so that the disk was asked for them.
        wait_s: seconds callers waited for rows.
    """

    rows: int = 0
    unique: int = 0
    bytes: int = 0
    cold: int = 0
    wait_s: float = 0.0

    def __sub__(self, earlier: Self) -> Self:
        """Return what was added since ``earlier``."""
        differences = {each.name: getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)}
        return type(self)(**differences)
