"""What every table store does, whatever holds its rows."""

from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.row_ids import FEW_ROWS


class TableStore(Protocol):
    """Rows of one table by id.

    One caller at a time; `request` alone may be called from another thread while a `gather` runs.
    """

    @property
    def counters(self) -> TableCounters:
        """Sums since the table was opened: the store's own object, which goes on counting."""
        ...

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Fill ``out [N, columns]``, the caller's and contiguous, with the rows of ``[N]`` ids; duplicates allowed.

        Raises:
            IndexError: a row id is outside ``[0, num_rows)``; nothing was read.
            TableError: the file no longer holds what the manifest says.
        """
        ...

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """Begin to bring the rows of ``[N]`` ids into memory and return; a later `gather` of them waits less.

        Raises:
            IndexError: a row id is outside ``[0, num_rows)``; nothing was requested.
        """
        ...

    def close(self) -> None:
        """Release files and memory; `gather` must not be called afterwards."""
        ...


def check_row_ids(row_ids: NDArray[np.int64], num_rows: int) -> None:
    """Raise IndexError for an id outside ``[0, num_rows)``, negative ids included."""
    if len(row_ids) <= FEW_ROWS:
        listed = row_ids.tolist()
        if not listed or (min(listed) >= 0 and max(listed) < num_rows):
            return
    # As unsigned numbers negative ids are huge, so one comparison finds both kinds.
    outside = row_ids.view(np.uint64) >= np.uint64(num_rows)
    if np.count_nonzero(outside):  # half the time of any()
        raise IndexError(f"row id {int(row_ids[outside][0])} is outside [0, {num_rows})")


def closed(memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: NDArray[np.float32]) -> NoReturn:
    """Be the decoder of a closed table, which holds on to no memory."""
    raise ValueError("the table is closed")
