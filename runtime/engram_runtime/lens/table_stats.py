"""What is in a table: norms, dead rows, copies, and what quantising would cost; one pass, whatever its size."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.lens.distinct import DistinctRecords
from engram_runtime.lens.mixing import record_hashes
from engram_runtime.lens.norms import NormHistogram, row_norms
from engram_runtime.lens.repack_errors import RepackErrors
from engram_runtime.table_spec import TableSpec

BLOCK_BYTES = 4 << 20  # of float32 values at a time
SAMPLE_BLOCK_ROWS = 256  # rows side by side that a sample reads
ERROR_ROWS = 65_536  # at most that many are quantised, evenly spread
NAMED_ROWS = 8  # of the rows that stand out, the first ones are named


class RowReader(Protocol):
    """Reads records of consecutive rows."""

    def read_rows(self, first: int, count: int) -> NDArray[np.uint8]:
        """Return ``[count, record_bytes]`` records."""
        ...


@dataclass(slots=True)
class RowsThatStandOut:
    """Rows that are all zeros, or not finite: how many, and which come first."""

    count: int
    first: list[int]

    def add(self, rows: NDArray[np.int64]) -> None:
        """Take ``[N]`` row ids."""
        self.count += len(rows)
        self.first += rows[: NAMED_ROWS - len(self.first)].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnRows:
    """The rows of a column: those of one hash head and n-gram order, or the whole table."""

    order: int
    head: int
    first_row: int


def columns_of(spec: TableSpec) -> list[ColumnRows]:
    """Return where the rows of each column begin; those from the keyer's ``min_rows`` on are read by none."""
    keyer = spec.keyer
    if not isinstance(keyer, NgramKeyerSpec):
        return [ColumnRows(order=1, head=0, first_row=0)]
    places = itertools.product(keyer.orders, range(keyer.num_heads))
    return [
        ColumnRows(order=order, head=head, first_row=first)
        for (order, head), first in zip(places, keyer.offsets, strict=True)
    ]


def sample_blocks(num_rows: int, wanted: int | None, block_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of rows to read: all, or at least ``wanted`` in small blocks evenly spread."""
    size = min(SAMPLE_BLOCK_ROWS, block_rows, num_rows if wanted is None else wanted)
    blocks = num_rows if wanted is None else -(-wanted // size)
    if blocks * size >= num_rows:
        yield from ((first, min(block_rows, num_rows - first)) for first in range(0, num_rows, block_rows))
        return
    yield from ((block * num_rows // blocks, size) for block in range(blocks))


class TableStats:
    """Sums over the rows of a table, taken block by block."""

    def __init__(self, spec: TableSpec, rows: int) -> None:
        """Prepare for so many rows of a table."""
        self.spec = spec
        self.rows = 0
        self.zero, self.not_finite = RowsThatStandOut(0, []), RowsThatStandOut(0, [])
        self.columns = columns_of(spec)
        self._starts = np.array([*(column.first_row for column in self.columns), spec.keyer.min_rows])
        self.norms = [NormHistogram() for _ in self._starts]  # the last one's rows are read by no column
        self.records = DistinctRecords(rows)
        self.errors = RepackErrors(spec.record.columns)
        self._error_step = -(-rows // ERROR_ROWS)

    def add(self, first: int, records: NDArray[np.uint8]) -> None:
        """Take ``[N, record_bytes]`` records of the rows from ``first`` on."""
        row_ids = np.arange(first, first + len(records))
        with np.errstate(invalid="ignore", over="ignore"):
            values = self.spec.record.decode(records)
            norms = row_norms(values)
        finite = np.isfinite(norms)
        alive = finite & (norms > 0)
        self.not_finite.add(row_ids[~finite])
        self.zero.add(row_ids[norms == 0])
        of_column = np.searchsorted(self._starts, row_ids, side="right") - 1
        for column in range(int(of_column[0]), int(of_column[-1]) + 1):
            self.norms[column].add(norms[alive & (of_column == column)])
        self.records.add(record_hashes(records[alive]))
        self.errors.add(values[-self.rows % self._error_step :: self._error_step])
        self.rows += len(records)

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as JSON values."""
        spec, whole = self.spec, sum(self.norms[1:], start=self.norms[0])
        return {
            "site": spec.site,
            "rows": spec.num_rows,
            "rows_read": self.rows,
            "rows_unreachable": spec.num_rows - spec.keyer.min_rows,
            "record": {"payload": spec.record.payload, "columns": spec.record.columns, "scale": spec.record.scale},
            "record_bytes": spec.record.record_bytes,
            "zero": {"rows": self.zero.count, "first": self.zero.first},
            "not_finite": {"rows": self.not_finite.count, "first": self.not_finite.first},
            "norms": {**_norm_facts(whole), "histogram": [list(bar) for bar in whole.bars(16)]},
            "copies": {
                "rows": self.records.copies,
                "compared": self.records.compared,
                "share_compared": self.records.rate,
            },
            "columns": [
                {"order": column.order, "head": column.head, "first_row": column.first_row, **_norm_facts(norms)}
                for column, norms in zip(self.columns, self.norms[:-1], strict=True)
            ],
            "requantised": self.errors.results(),
        }


def _norm_facts(norms: NormHistogram) -> dict[str, float | int | None]:
    if not norms.total:
        return {"rows": 0, "min": None, "median": None, "p99": None, "max": None}
    return {
        "rows": norms.total,
        "min": norms.least,
        "median": norms.quantile(0.5),
        "p99": norms.quantile(0.99),
        "max": norms.most,
    }


def table_stats(
    spec: TableSpec, reader: RowReader, wanted: int | None, progress: Callable[[int], None] = lambda count: None
) -> TableStats:
    """Read a table once and return what is in it.

    Args:
        wanted: rows to read, in blocks evenly spread; None reads all.
        progress: told the rows of each block.

    Raises:
        TableError: the files don't hold what the manifest says.
    """
    block_rows = max(1, BLOCK_BYTES // (4 * spec.record.columns))
    blocks = list(sample_blocks(spec.num_rows, wanted, block_rows))
    stats = TableStats(spec, sum(count for _, count in blocks))
    for first, count in blocks:
        stats.add(first, reader.read_rows(first, count))
        progress(count)
    return stats
