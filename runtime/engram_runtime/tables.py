"""Host tables: rows fetched by id, from memory or from files."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TableError
from engram_runtime.manifest import Extent, TableSpec
from engram_runtime.records import RecordFormat

CLOSED = -1  # no file has this number
RESIDENT_LIMIT_BYTES = 256 << 20  # a table below this is read into memory; larger ones are read row by row


class TableStore(Protocol):
    """Rows of one table by id."""

    def gather(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``[N, columns]`` float32 for ``[N]`` row ids; duplicates allowed, order kept, a fresh array.

        Raises:
            IndexError: a row id is outside ``[0, num_rows)``; nothing was read.
            TableError: the file no longer holds what the manifest says.
        """
        ...

    def close(self) -> None:
        """Release files; `gather` must not be called afterwards."""
        ...


class InMemoryTable:
    """A table held in memory as its records."""

    def __init__(self, records: NDArray[np.uint8], record: RecordFormat) -> None:
        self._records = records  # [rows, record_bytes]
        self._format = record

    def gather(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `TableStore.gather`."""
        check_row_ids(row_ids, len(self._records))
        return self._format.decode(self._records[row_ids])

    def close(self) -> None:
        """Nothing to release."""


class FileTable:
    """A table read record by record with `os.preadv`; survives truncation as an ordinary error."""

    def __init__(self, spec: TableSpec, extents: Sequence[tuple[Path, Extent]]) -> None:
        self._spec = spec
        self._parts: list[_OpenExtent] = []
        try:
            for path, extent in extents:
                self._parts.append(_OpenExtent(path, extent, spec.num_rows))
        except TableError:
            self.close()
            raise

    def gather(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `TableStore.gather`. Each distinct row is read once, in file order."""
        check_row_ids(row_ids, self._spec.num_rows)
        unique, inverse = np.unique(row_ids, return_inverse=True)
        records = np.empty((len(unique), self._spec.record.record_bytes), dtype=np.uint8)
        column = 0
        for part in self._parts:
            part.read_rows(unique, records[:, column : column + part.row_bytes])
            column += part.row_bytes
        return self._spec.record.decode(records)[inverse]

    def read_all(self) -> NDArray[np.uint8]:
        """Return ``[num_rows, record_bytes]`` records."""
        return np.concatenate([part.read_all() for part in self._parts], axis=1)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _OpenExtent:
    """One open run of rows: row i lies at ``offset + i * row_bytes``."""

    def __init__(self, path: Path, extent: Extent, num_rows: int) -> None:
        self._path = path
        self._num_rows = num_rows
        self._offset = extent.offset
        self.row_bytes = extent.row_bytes
        try:
            # Without O_NONBLOCK a pipe in place of the file would wait for a writer.
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TableError(f"table file {path} can't be opened: {error.strerror}; export the bundle again") from error
        self._check_size(os.fstat(self._file).st_size)
        os.posix_fadvise(self._file, self._offset, 0, os.POSIX_FADV_RANDOM)

    def _check_size(self, size: int) -> None:
        needed = self._offset + self._num_rows * self.row_bytes
        if size < needed:
            self.close()
            raise TableError(f"table file {self._path} holds {size} bytes, its rows need {needed}; export it again")

    def read_rows(self, row_ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Fill ``out [N, row_bytes]``; all reads are announced to the kernel before the first one waits."""
        offsets = [self._offset + int(row) * self.row_bytes for row in row_ids]
        for offset in offsets:
            os.posix_fadvise(self._file, offset, self.row_bytes, os.POSIX_FADV_WILLNEED)
        buffer = np.empty(self.row_bytes, dtype=np.uint8)
        for index, offset in enumerate(offsets):
            self._read_into(buffer, offset)
            out[index] = buffer

    def read_all(self) -> NDArray[np.uint8]:
        """Return ``[num_rows, row_bytes]``."""
        data = np.empty(self._num_rows * self.row_bytes, dtype=np.uint8)
        self._read_into(data, self._offset)
        return data.reshape(self._num_rows, self.row_bytes)

    def _read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        view = buffer.data
        while view:
            try:
                count = os.preadv(self._file, [view], offset)
            except OSError as error:
                raise TableError(f"table file {self._path} can't be read at {offset}: {error.strerror}") from error
            if count == 0:
                raise TableError(f"table file {self._path} ends before byte {offset + len(view)}: it was truncated")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        # Closing twice would close whatever file has been given the number since.
        if self._file != CLOSED:
            os.close(self._file)
            self._file = CLOSED


def open_table(bundle: Bundle, spec: TableSpec) -> TableStore:
    """Open a bundle's table: resident below `RESIDENT_LIMIT_BYTES`, read from its files above."""
    table = FileTable(spec, [(bundle.table_path(extent), extent) for extent in spec.extents])
    if spec.num_rows * spec.record.record_bytes > RESIDENT_LIMIT_BYTES:
        return table
    with table:
        return InMemoryTable(table.read_all(), spec.record)


def check_row_ids(row_ids: NDArray[np.int64], num_rows: int) -> None:
    """Raise IndexError for an id outside ``[0, num_rows)``, negative ids included."""
    # As unsigned numbers negative ids are huge, so one comparison finds both kinds.
    outside = row_ids.view(np.uint64) >= np.uint64(num_rows)
    if outside.any():
        raise IndexError(f"row id {int(row_ids[outside][0])} is outside [0, {num_rows})")
