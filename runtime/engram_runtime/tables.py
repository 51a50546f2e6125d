"""Host tables: rows fetched by id, from memory or from files."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TableError
from engram_runtime.records import RecordFormat
from engram_runtime.table_spec import RowRange, TablePart, TableSpec

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

    def __init__(self, spec: TableSpec, locate: Callable[[RowRange], Path]) -> None:
        """Open every file once; ``locate`` tells where on this machine the file of a range is.

        Raises:
            TableError: a file is missing or too short.
        """
        self._spec = spec
        self._files: _OpenFiles = {}
        try:
            for rows in spec.ranges:
                if (rows.file, rows.identity) not in self._files:
                    self._files[rows.file, rows.identity] = _OpenFile(locate(rows))
            self._parts = [_OpenPart(part, self._files) for part in spec.parts]
            for file in self._files.values():
                file.expect_random_reads()
        except TableError:
            self.close()
            raise

    def gather(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `TableStore.gather`. Each distinct row is read once, in file order."""
        check_row_ids(row_ids, self._spec.num_rows)
        unique, inverse = np.unique(row_ids, return_inverse=True)
        places = [part.places(unique) for part in self._parts]
        # All reads are announced to the kernel before the first one waits.
        for part, found in zip(self._parts, places, strict=True):
            for file, offset in found:
                file.announce(offset, part.row_bytes)
        records = np.empty((len(unique), self._spec.record.record_bytes), dtype=np.uint8)
        for columns, found in zip(self._columns(records), places, strict=True):
            for row, (file, offset) in zip(columns, found, strict=True):
                file.read_into(row, offset)
        return self._spec.record.decode(records)[inverse]

    def read_rows(self, first: int, count: int) -> NDArray[np.uint8]:
        """Return ``[count, record_bytes]`` records of consecutive rows, which must be in the table."""
        records = np.empty((count, self._spec.record.record_bytes), dtype=np.uint8)
        for part, columns in zip(self._parts, self._columns(records), strict=True):
            part.read_rows(first, columns)
        return records

    def read_all(self) -> NDArray[np.uint8]:
        """Return ``[num_rows, record_bytes]`` records."""
        return self.read_rows(0, self._spec.num_rows)

    def _columns(self, records: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Split records ``[N, record_bytes]`` into views of their parts."""
        ends = np.cumsum([part.row_bytes for part in self._parts])
        return np.split(records, ends[:-1], axis=1)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _OpenPart:
    """A part of the records: its row ranges, found by bisection."""

    def __init__(self, part: TablePart, files: "_OpenFiles") -> None:
        self.row_bytes = part.row_bytes
        self._ranges = part.ranges
        self._files = [files[rows.file, rows.identity] for rows in part.ranges]
        self._first_rows = np.array([rows.first_row for rows in part.ranges], dtype=np.int64)
        self._offsets = np.array([rows.offset for rows in part.ranges], dtype=np.int64)
        for file, rows in zip(self._files, part.ranges, strict=True):
            file.check_size(rows.offset + rows.num_rows * part.row_bytes)

    def places(self, row_ids: NDArray[np.int64]) -> list[tuple["_OpenFile", int]]:
        """Return the file and offset of each of ``[N]`` row ids."""
        found = np.searchsorted(self._first_rows, row_ids, side="right") - 1
        offsets = self._offsets[found] + (row_ids - self._first_rows[found]) * self.row_bytes
        return [(self._files[index], offset) for index, offset in zip(found.tolist(), offsets.tolist(), strict=True)]

    def read_rows(self, first: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out [N, row_bytes]`` with rows from ``first`` on, one read per range they lie in."""
        for file, rows in zip(self._files, self._ranges, strict=True):
            start = max(first, rows.first_row)
            stop = min(first + len(out), rows.first_row + rows.num_rows)
            if start < stop:
                data = np.empty((stop - start) * self.row_bytes, dtype=np.uint8)
                file.read_into(data, rows.offset + (start - rows.first_row) * self.row_bytes)
                out[start - first : stop - first] = data.reshape(-1, self.row_bytes)


class _OpenFile:
    """A file of rows, open for reading at any place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Without O_NONBLOCK a pipe in place of the file would wait for a writer.
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TableError(f"table file {path} can't be opened: {error.strerror}; export the bundle again") from error
        self._size = os.fstat(self._file).st_size

    def check_size(self, needed: int) -> None:
        """Refuse a file shorter than its rows."""
        if self._size < needed:
            raise TableError(
                f"table file {self._path} holds {self._size} bytes, its rows need {needed}; export it again"
            )

    def expect_random_reads(self) -> None:
        """Tell the kernel not to read ahead; only files large enough for rows are ones it takes advice on."""
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def announce(self, offset: int, num_bytes: int) -> None:
        """Tell the kernel that bytes are about to be read."""
        os.posix_fadvise(self._file, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill a contiguous buffer from a place in the file."""
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


_OpenFiles = dict[tuple[str, str | None], _OpenFile]  # by name and identity, so that each identity is checked


def open_table(bundle: Bundle, spec: TableSpec) -> TableStore:
    """Open a bundle's table: resident below `RESIDENT_LIMIT_BYTES`, read from its files above."""
    table = FileTable(spec, bundle.table_path)
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
