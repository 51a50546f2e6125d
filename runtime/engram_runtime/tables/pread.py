"""A table read row by row: it keeps nothing of it in memory, and a damaged file is an ordinary error."""

import os
import time
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.checksums import UNCHECKED, Checksums
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.decoding import RowDecoder
from engram_runtime.tables.record_file import BlockReader, Read
from engram_runtime.tables.record_files import Locate, RecordFiles
from engram_runtime.tables.residency import BLOCK_ROWS, PRESENT, REQUESTED, UNKNOWN, Residency
from engram_runtime.tables.row_ids import distinct
from engram_runtime.tables.store import check_row_ids

STAGING_BYTES = 4 << 20  # of records read before they are decoded, unless a single one has more


class PreadTable:
    """A table read record by record with `os.preadv`.

    It is the store that no damage to a file can kill: what a file no longer gives is a `TableError`, each time. Rows
    that may come from the disk are read with the blocks they lie in, and those are held against their checksums.
    """

    def __init__(self, spec: TableSpec, decoder: RowDecoder, files: RecordFiles) -> None:
        """Read from open files, which are the table's to close."""
        self.spec = spec
        self.counters = TableCounters()
        self.files = files
        self.files.expect_random_reads()
        self._residency = Residency(self.files.num_bytes, self.files.part_bytes)
        self._decode = decoder
        self._block = min(BLOCK_ROWS, max(1, STAGING_BYTES // spec.record.record_bytes))
        self._staging = np.empty(self._block * spec.record.record_bytes, dtype=np.uint8)
        self._bytes = self._staging.data
        # The staging holds first parts one after another, then second parts.
        part_bytes = np.array(self.files.part_bytes, dtype=np.int64)
        begins = (part_bytes.cumsum() - part_bytes) * self._block
        self._begins: list[int] = begins.tolist()
        self._staged = part_bytes[:, None], begins[:, None]

    @classmethod
    def open(
        cls,
        spec: TableSpec,
        locate: Locate,
        decoder: RowDecoder,
        *,
        checksums: Checksums = UNCHECKED,
        read: Read = os.preadv,
    ) -> Self:
        """Open every file once; ``locate`` tells where on this machine the file of a range is.

        Raises:
            TableError: a file is missing or too short.
        """
        return cls(spec, decoder, RecordFiles(spec, locate, read, checksums))

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`. Each distinct row of a block is read once, in file order."""
        check_row_ids(row_ids, self.spec.num_rows)
        self._residency.forget_old()
        cold, wait_s = 0, 0.0
        for start in range(0, len(row_ids), self._block):
            stop = start + self._block
            if stop < len(row_ids):
                self._ask(row_ids[stop : stop + self._block])
            unique, inverse = distinct(row_ids[start:stop])
            started = time.perf_counter()
            if missed := self._read(unique):
                cold += missed
                wait_s += time.perf_counter() - started
            sizes, begins = self._staged
            self._decode(self._staging, inverse * sizes + begins, out[start:stop])
        self.counters.count(row_ids, self.spec.record.record_bytes, cold, wait_s)

    def _read(self, unique: NDArray[np.int64]) -> int:
        """Fill the staging with ``[N]`` rows; returns how many of them were not known to be in memory.

        Those are asked for before the first one is waited for.
        """
        addresses = self.files.addresses(unique)
        pages = self._residency.pages(addresses)
        states = self._residency.states(pages).min(axis=0).tolist()
        waiting = []
        for found, size, begin in zip(addresses, self.files.part_bytes, self._begins, strict=True):
            for row, (file, offset) in enumerate(self.files.places(found)):
                buffer = self._bytes[begin + row * size : begin + (row + 1) * size]
                if states[row] == PRESENT and file.read_if_cached(buffer, offset):
                    continue
                if states[row] != REQUESTED:
                    file.announce(offset, size)
                waiting.append((row, file, buffer, offset))
        if not waiting:
            return 0
        reader = BlockReader()
        for _, file, buffer, offset in waiting:
            reader.read_into(file, buffer, offset)
        self._residency.mark(pages, PRESENT)
        return len({row for row, *_ in waiting})

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`: what was read or requested lately is not asked for."""
        check_row_ids(row_ids, self.spec.num_rows)
        self._ask(row_ids)

    def _ask(self, row_ids: NDArray[np.int64]) -> None:
        """Begin to read the rows of which a page is unknown."""
        addresses = self.files.addresses(row_ids)
        pages = self._residency.pages(addresses)
        unknown = self._residency.states(pages) == UNKNOWN
        for found, size in zip(addresses, self.files.part_bytes, strict=True):
            for file, offset in self.files.places(found[unknown.any(axis=0)]):
                file.announce(offset, size)
        self._residency.mark(pages[unknown], REQUESTED)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self.files.close()
