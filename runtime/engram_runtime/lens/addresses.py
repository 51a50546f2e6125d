"""Where the rows of a table lie, in one space of addresses: which pages a row is on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError
from engram_runtime.strict_json import Fields
from engram_runtime.table_spec import RowRange, TableSpec

PAGE_BYTES = 4096  # of the page cache


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAddresses:
    """A part of the records: row i lies at ``addresses[r] + (i - first_rows[r]) * row_bytes`` for its range r."""

    row_bytes: int
    first_rows: tuple[int, ...]
    addresses: tuple[int, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse and check what can be checked by itself."""
        part = cls(
            row_bytes=fields.count("row_bytes", least=1),
            first_rows=fields.integers("first_rows"),
            addresses=fields.integers("addresses"),
        )
        fields.finish()
        starts, largest = list(part.first_rows), max(part.addresses, default=-1)
        if starts[:1] != [0] or starts != sorted(set(starts)) or len(starts) != len(part.addresses):
            raise BundleError(
                f"ranges of rows begin at {starts[:4]}, expected ascending rows from 0, each with an address"
            )
        if min(part.addresses) < 0 or max(starts[-1], largest, part.row_bytes) >= 2**53:
            raise BundleError(f"rows lie at addresses up to {largest}, expected 0 to 2**53")
        return part

    def page_span(self, row_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first and the last page of each of ``[N]`` rows."""
        found = np.searchsorted(self.first_rows, row_ids, side="right") - 1
        first_rows, addresses = np.array(self.first_rows), np.array(self.addresses)
        start = addresses[found] + (row_ids - first_rows[found]) * self.row_bytes
        return start // PAGE_BYTES, (start + self.row_bytes - 1) // PAGE_BYTES


def touched_pages(
    parts: Sequence[PartAddresses], row_ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pages that ``[N]`` rows are on, row by row, as many as each touches, and of each the row's place."""
    spans = [part.page_span(row_ids) for part in parts]
    first, last = (np.stack(pages, axis=1).ravel() for pages in zip(*spans, strict=True))
    counts = last - first + 1
    after_first = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(np.arange(len(row_ids)).repeat(len(parts)), counts)
    return np.repeat(first, counts) + after_first, rows


def part_addresses(spec: TableSpec) -> tuple[PartAddresses, ...]:
    """Lay the files of a table one after the other, each from a page of its own, and return where its rows are."""
    ends: dict[tuple[str, str | None], int] = {}
    for part in spec.parts:
        for rows in part.ranges:
            end = rows.offset + rows.num_rows * part.row_bytes
            ends[_file(rows)] = max(end, ends.get(_file(rows), 0))
    starts, reached = {}, 0
    for file, end in ends.items():
        starts[file] = reached
        reached += -(-end // PAGE_BYTES) * PAGE_BYTES
    return tuple(
        PartAddresses(
            row_bytes=part.row_bytes,
            first_rows=tuple(rows.first_row for rows in part.ranges),
            addresses=tuple(starts[_file(rows)] + rows.offset for rows in part.ranges),
        )
        for part in spec.parts
    )


def _file(rows: RowRange) -> tuple[str, str | None]:
    return rows.file, rows.identity
