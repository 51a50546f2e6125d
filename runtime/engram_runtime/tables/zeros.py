"""A table that is not read: all its rows are zeros."""

import numpy as np
from numpy.typing import NDArray

from engram_runtime.tables.counters import TableCounters


class ZeroTable:
    """What lies below an overlay that stands for a whole table."""

    def __init__(self) -> None:
        self.counters = TableCounters()

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`; the overlay has checked the ids."""
        out.fill(0)
        self.counters.count(row_ids, record_bytes=0, cold=0, wait_s=0.0)

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`: there is nothing to bring."""

    def close(self) -> None:
        """See `TableStore.close`: there is nothing to release."""
