"""A table held in memory."""

import numpy as np
from numpy.typing import NDArray

from engram_runtime.records import RecordFormat
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.store import check_row_ids


class InMemoryTable:
    """A table held in memory as its records."""

    def __init__(self, records: NDArray[np.uint8], record: RecordFormat) -> None:
        self._records = records  # [rows, record_bytes]
        self._format = record
        self.counters = TableCounters()

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`."""
        check_row_ids(row_ids, len(self._records))
        unique = len(set(row_ids.tolist()))
        self.counters.rows += len(row_ids)
        self.counters.unique += unique
        self.counters.bytes += unique * self._format.record_bytes
        out[...] = self._format.decode(self._records[row_ids])

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`: rows are in memory already."""
        check_row_ids(row_ids, len(self._records))

    def close(self) -> None:
        """Nothing to release."""
