"""How the user wants tables to be read."""

from dataclasses import dataclass
from pathlib import Path

from engram_runtime.errors import RequestError

AUTO, RESIDENT, MMAP, PREAD = "auto", "resident", "mmap", "pread"
TABLE_IO = (AUTO, RESIDENT, MMAP, PREAD)
UNREAD = "unread"  # no choice of the user's: an overlay hides the table


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """What `engram_runtime.tables.opening` goes by.

    Attributes:
        io: one of `TABLE_IO`: ``resident`` in memory, ``mmap`` or ``pread`` to read rows as they are asked for, or
            ``auto`` for what measurement recommends, see `engram_runtime.tables.policy`.
        ram_bytes: the most that all resident tables together may take, or None for a share of the free memory.
        overlays: files of rows that replace a site's own, the last one first asked.
    """

    io: str = AUTO
    ram_bytes: int | None = None
    overlays: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.io not in TABLE_IO:
            raise RequestError(f"table io is {self.io!r}, expected one of {', '.join(TABLE_IO)}")
        if self.ram_bytes is not None and self.ram_bytes < 0:
            raise RequestError(f"table ram is {self.ram_bytes} bytes, expected 0 or more")
        if self.ram_bytes is not None and self.io in (MMAP, PREAD):
            raise RequestError(
                f"table ram is for resident tables, with table io {self.io} there are none; leave it out"
            )
