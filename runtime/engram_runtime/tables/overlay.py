"""A table with some of its rows replaced, or all of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TableError
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.overlay_file import ZERO, Overlay, OverlaySpec, read_overlay
from engram_runtime.tables.row_ids import count_distinct
from engram_runtime.tables.store import TableStore, check_row_ids
from engram_runtime.tables.zeros import ZeroTable


class OverlayTable:
    """A table whose rows are an overlay's where that has them; the table below is not asked for those.

    Rows of the overlay are in memory: they are never cold, and nobody waits for them.
    """

    def __init__(self, base: TableStore, overlay: Overlay) -> None:
        self.counters = TableCounters()
        self._base = base
        self._num_rows = overlay.spec.num_rows
        self._format = overlay.spec.record
        self._row_ids = overlay.row_ids
        self._records = overlay.records
        self._unique = 0  # distinct rows of the overlay, batch by batch

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`."""
        check_row_ids(row_ids, self._num_rows)
        places, own = self._find(row_ids)
        hits = np.flatnonzero(own)
        if len(hits) < len(row_ids):
            # The base fills the caller's buffer: in place of a row it must not be asked for comes one it is asked for.
            asked = np.where(own, row_ids[own.argmin()], row_ids) if len(hits) else row_ids
            self._base.gather(asked, out)
        if len(hits):
            out[hits] = self._format.decode(self._records[places[hits]])
        self._count(len(row_ids), places[hits])

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`."""
        check_row_ids(row_ids, self._num_rows)
        _, own = self._find(row_ids)
        if not own.all():
            self._base.request(row_ids[~own])

    def close(self) -> None:
        """See `TableStore.close`."""
        self._base.close()

    def _find(self, row_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return where in the overlay each of ``[N]`` rows is, and whether it is there."""
        if len(self._row_ids) == 0:
            return np.zeros(len(row_ids), dtype=np.int64), np.zeros(len(row_ids), dtype=np.bool_)
        places = np.searchsorted(self._row_ids, row_ids)
        np.minimum(places, len(self._row_ids) - 1, out=places)
        return places, self._row_ids[places] == row_ids

    def _count(self, rows: int, places: NDArray[np.int64]) -> None:
        below = self._base.counters
        self._unique += count_distinct(places)
        self.counters.rows += rows
        self.counters.unique = below.unique + self._unique
        self.counters.bytes = below.bytes + self._unique * self._format.record_bytes
        self.counters.cold, self.counters.wait_s = below.cold, below.wait_s


def read_overlays(bundle: Bundle, paths: Sequence[Path]) -> dict[str, list[Overlay]]:
    """Read the overlays for a bundle's tables, by site, in the order they are given.

    Raises:
        TableError: an overlay is damaged, or is for a table that the bundle doesn't have.
    """
    tables = {table.site: table for table in bundle.manifest.tables}
    overlays: dict[str, list[Overlay]] = {site: [] for site in tables}
    for path in paths:
        overlay = read_overlay(path)
        site = overlay.spec.site
        if site not in tables:
            raise TableError(f"overlay {path} is for site {site!r}, the bundle has sites {sorted(tables)}")
        if mismatch := overlay.spec.mismatch(OverlaySpec.of(bundle, tables[site])):
            name, found, expected = mismatch
            raise TableError(f"overlay {path} is for another table {site}: its {name} is {found}, expected {expected}")
        overlays[site].append(overlay)
    return overlays


def hide_table(overlays: Sequence[Overlay]) -> bool:
    """Whether overlays leave no row to the table below them, so that it needn't be opened."""
    return any(overlay.spec.others == ZERO for overlay in overlays)


def with_overlays(table: TableStore, overlays: Sequence[Overlay]) -> TableStore:
    """Lay overlays over a table, the last one on top; one whose others are zero hides all that is below it."""
    for overlay in overlays:
        below = ZeroTable() if overlay.spec.others == ZERO else table
        table = OverlayTable(below, overlay)
    return table
