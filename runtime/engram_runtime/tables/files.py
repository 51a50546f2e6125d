"""A table read from its files."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TableError
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.store import check_row_ids

CLOSED = -1  # no file has this number


class FileTable:
    """A table read record by record with `os.preadv`; survives truncation as an ordinary error."""

    def __init__(self, spec: TableSpec, locate: Callable[[RowRange], Path]) -> None:
        """Open every file once; ``locate`` tells where on this machine the file of a range is.

        Raises:
            TableError: a file is missing or too short.
        """
        self._spec = spec
        self.counters = TableCounters()
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

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`. Each distinct row is read once, in file order."""
        check_row_ids(row_ids, self._spec.num_rows)
        started = time.perf_counter()
        unique, inverse = np.unique(row_ids, return_inverse=True)
        places = [part.places(unique) for part in self._parts]
        self._announce(places)  # all of them before the first one waits
        records = np.empty((len(unique), self._spec.record.record_bytes), dtype=np.uint8)
        for columns, found in zip(self._columns(records), places, strict=True):
            for row, (file, offset) in zip(columns, found, strict=True):
                file.read_into(row, offset)
        out[...] = self._spec.record.decode(records)[inverse]
        self._count(len(row_ids), len(unique), time.perf_counter() - started)

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`."""
        check_row_ids(row_ids, self._spec.num_rows)
        self._announce([part.places(row_ids) for part in self._parts])

    def _announce(self, places: "Sequence[Sequence[tuple[_OpenFile, int]]]") -> None:
        for part, found in zip(self._parts, places, strict=True):
            for file, offset in found:
                file.announce(offset, part.row_bytes)

    def _count(self, rows: int, unique: int, seconds: float) -> None:
        self.counters.rows += rows
        self.counters.unique += unique
        self.counters.bytes += unique * self._spec.record.record_bytes
        self.counters.cold += unique
        self.counters.wait_s += seconds

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
