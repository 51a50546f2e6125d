"""A table as export reads it: whole stretches of records, and rows by id."""

import os
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.checksums import UNCHECKED, Checksums
from engram_runtime.tables.decoding import NumpyRowDecoder
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.record_file import Read
from engram_runtime.tables.record_files import Locate, RecordFiles


class FileTable(PreadTable):
    """A table that is read, decoded by numpy, whose records can be had as they are."""

    def __init__(
        self, spec: TableSpec, locate: Locate, *, checksums: Checksums = UNCHECKED, read: Read = os.preadv
    ) -> None:
        """See `PreadTable`."""
        decoder = NumpyRowDecoder(spec.record, [part.row_bytes for part in spec.parts])
        super().__init__(spec, decoder, RecordFiles(spec, locate, read, checksums))

    def read_rows(self, first: int, count: int) -> NDArray[np.uint8]:
        """Return ``[count, record_bytes]`` records of consecutive rows, which must be in the table."""
        records = np.empty((count, self.spec.record.record_bytes), dtype=np.uint8)
        self.files.read_rows(first, records)
        return records

    def read_all(self) -> NDArray[np.uint8]:
        """Return ``[num_rows, record_bytes]`` records."""
        return self.read_rows(0, self.spec.num_rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
