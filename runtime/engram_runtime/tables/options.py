"""How the user wants tables to be read."""

from dataclasses import dataclass
from pathlib import Path

AUTO, RESIDENT, MMAP, PREAD = "auto", "resident", "mmap", "pread"
TABLE_IO = (AUTO, RESIDENT, MMAP, PREAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """What `engram_runtime.tables.opening` goes by.

    Attributes:
        io: one of `TABLE_IO`.
        ram_bytes: the most that all resident tables together may take, or None for a share of the free memory.
        overlays: files of rows that replace a site's own, the last one first asked.
    """

    io: str = AUTO
    ram_bytes: int | None = None
    overlays: tuple[Path, ...] = ()
