"""Which rows of two tables differ."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TableError
from engram_runtime.records import RecordFormat
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.overlay_file import OverlaySpec, RowBlock

SLICE_BYTES = 8 << 20  # decoded rows of one table at a time

Progress = Callable[[int], object]  # told how many rows were compared


def check_comparable(first: OverlaySpec, second: OverlaySpec) -> None:
    """Refuse tables whose rows don't answer the same questions; raises TableError."""
    if mismatch := first.mismatch(second):
        name, of_first, of_second = mismatch
        raise TableError(
            f"tables {first.site} can't be compared: the {name} of the first is {of_first}, of the second {of_second}"
        )


def different_rows(
    first: FileTable, second: FileTable, formats: tuple[RecordFormat, RecordFormat], num_rows: int, progress: Progress
) -> Iterator[RowBlock]:
    """Yield rows of the second table that differ from the first's, ascending, never more than some MiB at once.

    Records of one format differ where their bytes do, others where the values' bits do.

    Args:
        formats: of the first and the second table, with as many columns.
    """
    step = max(1, SLICE_BYTES // (4 * formats[0].columns))
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        mine, other = first.read_rows(start, count), second.read_rows(start, count)
        found = np.flatnonzero((_comparable(mine, formats, 0) != _comparable(other, formats, 1)).any(axis=1))
        if found.size:
            yield start + found, other[found]
        progress(count)


def _comparable(
    records: NDArray[np.uint8], formats: tuple[RecordFormat, RecordFormat], which: int
) -> NDArray[np.uint8] | NDArray[np.uint32]:
    if formats[0] == formats[1]:
        return records
    return formats[which].decode(records).view(np.uint32)
