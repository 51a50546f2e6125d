"""The files of a table's records, laid out as one range of addresses."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TableError
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.checksums import UNCHECKED, Checksums
from engram_runtime.tables.record_file import Read, RecordFile

ALIGNMENT_BYTES = 65536  # of a file's first address: a multiple of every page size
Locate = Callable[[RowRange], Path]


class RecordFiles:
    """All files of a table, each at addresses of its own, so that a place of any of them is one number."""

    def __init__(
        self, spec: TableSpec, locate: Locate, read: Read = os.preadv, checksums: Checksums = UNCHECKED
    ) -> None:
        """Open every file once; ``locate`` tells where on this machine the file of a range is.

        Raises:
            TableError: a file is missing or too short.
        """
        self.part_bytes = tuple(part.row_bytes for part in spec.parts)
        self.num_bytes = 0  # of the addresses
        self.files: list[RecordFile] = []
        try:
            by_key = self._open(spec, locate, read, checksums)
        except TableError:
            self.close()
            raise
        self._starts = np.array([file.start for file in self.files], dtype=np.int64)
        self._parts = [_PartPlaces(part, [by_key[_key(rows)].start for rows in part.ranges]) for part in spec.parts]

    def _open(self, spec: TableSpec, locate: Locate, read: Read, checksums: Checksums) -> "dict[_Key, RecordFile]":
        opened: dict[_Key, RecordFile] = {}
        for rows, num_bytes in _bytes_needed(spec).values():
            file = RecordFile(locate(rows), self.num_bytes, num_bytes, read, checksums.get(rows.file))
            self.num_bytes += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            self.files.append(file)
            opened[_key(rows)] = file
        return opened

    def addresses(self, row_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``[parts, N]`` addresses of the parts of ``[N]`` rows, which must be in the table."""
        found = np.empty((len(self._parts), len(row_ids)), dtype=np.int64)
        for part, addresses in zip(self._parts, found, strict=True):
            part.fill(row_ids, addresses)
        return found

    def places(self, addresses: NDArray[np.int64]) -> list[tuple[RecordFile, int]]:
        """Return the files that ``[N]`` addresses are in, and where in them."""
        found = self._starts.searchsorted(addresses, side="right") - 1
        offsets = addresses - self._starts[found]
        return [(self.files[index], offset) for index, offset in zip(found.tolist(), offsets.tolist(), strict=True)]

    def lease(self) -> None:
        """Do `RecordFile.lease` for every file; of those that are not granted `check` looks at the sizes."""
        for file in self.files:
            file.lease()

    def end_leases(self) -> None:
        """Let others change the files."""
        for file in self.files:
            file.end_lease()

    def check(self, addresses: NDArray[np.int64]) -> None:
        """Do `RecordFile.check` for every file that one of the addresses is in."""
        if len(self.files) == 1:
            return self.files[0].check()
        counts = np.bincount(self._starts.searchsorted(addresses.ravel(), side="right"))
        for index in counts.nonzero()[0].tolist():
            self.files[index - 1].check()

    def expect_random_reads(self) -> None:
        """Tell the kernel not to read ahead."""
        for file in self.files:
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read_rows(self, first: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out [N, record_bytes]`` with consecutive records from row ``first`` on."""
        begin = 0
        for part, row_bytes in zip(self._parts, self.part_bytes, strict=True):
            columns = out[:, begin : begin + row_bytes]
            for rows, address in part.runs(first, len(out)):
                self._read_run(columns[rows], address)
            begin += row_bytes

    def _read_run(self, out: NDArray[np.uint8], address: int) -> None:
        data = out.reshape(-1) if out.flags.c_contiguous else np.empty(out.size, dtype=np.uint8)
        ((file, offset),) = self.places(np.array([address]))
        file.read_checked(data.data, offset)
        if not out.flags.c_contiguous:
            out[...] = data.reshape(out.shape)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self.files:
            file.close()


class _PartPlaces:
    """Where the rows of a part are: at ``row_id * row_bytes`` and a shift for each range of rows."""

    def __init__(self, part: TablePart, file_starts: Sequence[int]) -> None:
        self._row_bytes = part.row_bytes
        self._first_rows = np.array([rows.first_row for rows in part.ranges], dtype=np.int64)
        self._ends = np.array([rows.first_row + rows.num_rows for rows in part.ranges], dtype=np.int64)
        begins = [start + rows.offset for start, rows in zip(file_starts, part.ranges, strict=True)]
        self._shifts = np.array(begins, dtype=np.int64) - self._first_rows * part.row_bytes

    def fill(self, row_ids: NDArray[np.int64], out: NDArray[np.int64]) -> None:
        """Fill ``out [N]`` with the addresses of ``[N]`` rows."""
        np.multiply(row_ids, self._row_bytes, out=out)
        if len(self._shifts) == 1:
            out += self._shifts
        else:
            out += self._shifts[self._first_rows.searchsorted(row_ids, side="right") - 1]

    def runs(self, first: int, count: int) -> "list[tuple[slice, int]]":
        """Return for each range that has some of the rows from ``first`` on which of them, and their address."""
        starts = np.clip(self._first_rows, first, first + count)
        stops = np.clip(self._ends, first, first + count)
        return [
            (slice(start - first, stop - first), start * self._row_bytes + shift)
            for start, stop, shift in zip(starts.tolist(), stops.tolist(), self._shifts.tolist(), strict=True)
            if start < stop
        ]


_Key = tuple[str, str | None]  # name and identity, so that each identity is checked


def _key(rows: RowRange) -> _Key:
    return rows.file, rows.identity


def _bytes_needed(spec: TableSpec) -> dict[_Key, tuple[RowRange, int]]:
    """Return a range of each file, and how many bytes of the file the table's rows need."""
    needed: dict[_Key, tuple[RowRange, int]] = {}
    for part in spec.parts:
        for rows in part.ranges:
            _, earlier = needed.get(_key(rows), (rows, 0))
            needed[_key(rows)] = rows, max(earlier, rows.offset + rows.num_rows * part.row_bytes)
    return needed
