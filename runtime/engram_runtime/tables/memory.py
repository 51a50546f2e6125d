"""A table held in memory."""

import math
from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.table_spec import CHECKSUM_BLOCK_BYTES, TableSpec
from engram_runtime.tables.checksums import UNCHECKED, Checksums
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.decoding import RowDecoder
from engram_runtime.tables.record_files import Locate, RecordFiles
from engram_runtime.tables.regions import allocate_huge
from engram_runtime.tables.store import check_row_ids, closed

READ_BYTES = 8 << 20  # at a time
Progress = Callable[[int], None]


def no_progress(num_bytes: int) -> None:
    """Be told of bytes that were read, and do nothing."""


class ResidentTable:
    """A table held in memory as its records, in huge pages where the system gives them."""

    def __init__(self, memory: NDArray[np.uint8], spec: TableSpec, decoder: RowDecoder) -> None:
        """Hold ``memory [num_rows * record_bytes]``, the records of all rows."""
        self._spec = spec
        self._memory = memory
        self._decode = decoder
        # The parts of a record lie side by side: one cache miss a row, whatever the files look like.
        part_bytes = np.array([part.row_bytes for part in spec.parts], dtype=np.int64)
        self._begins = (part_bytes.cumsum() - part_bytes)[:, None]
        self.counters = TableCounters()

    @classmethod
    def load(
        cls,
        spec: TableSpec,
        locate: Locate,
        decoder: RowDecoder,
        *,
        checksums: Checksums = UNCHECKED,
        progress: Progress = no_progress,
    ) -> Self:
        """Read a table's files and hold all of it against checksums; ``progress`` is told the bytes of each piece.

        They stay in the page cache as well, until something needs that memory: the next process loads the table from
        there.

        Raises:
            TableError: a file is missing, too short, damaged or can't be read, or there is no memory.
        """
        record_bytes = spec.record.record_bytes
        files = RecordFiles(spec, locate, checksums=checksums)
        try:
            memory = allocate_huge(spec.num_rows * record_bytes)
            records = memory.reshape(spec.num_rows, record_bytes)
            whole_blocks = CHECKSUM_BLOCK_BYTES // math.gcd(CHECKSUM_BLOCK_BYTES, record_bytes)  # so many rows have
            step = max(1, READ_BYTES // record_bytes // whole_blocks) * whole_blocks
            for start in range(0, spec.num_rows, step):
                piece = records[start : start + step]
                files.read_rows(start, piece)
                progress(piece.size)
        finally:
            files.close()
        return cls(memory, spec, decoder)

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`."""
        check_row_ids(row_ids, self._spec.num_rows)
        self._decode(self._memory, row_ids * self._spec.record.record_bytes + self._begins, out)
        self.counters.count(row_ids, self._spec.record.record_bytes, cold=0, wait_s=0.0)

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`: rows are in memory already."""
        check_row_ids(row_ids, self._spec.num_rows)

    def close(self) -> None:
        """Release the memory; a second call does nothing."""
        self._memory, self._decode = np.empty(0, dtype=np.uint8), closed
