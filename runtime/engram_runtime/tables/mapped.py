"""A table mapped into memory: rows that are there cost no system call, others are brought in by the batch."""

import contextlib
import os
import resource
import time
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.advice import POPULATE_READ, WILL_NEED, Advice, MemoryAdvice
from engram_runtime.tables.checksums import UNCHECKED, Checksums
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.decoding import SHARED_FROM_ROWS, RowDecoder
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.record_file import FileWanted, Read
from engram_runtime.tables.record_files import Locate, RecordFiles
from engram_runtime.tables.regions import map_files
from engram_runtime.tables.residency import BLOCK_ROWS, PRESENT, REQUESTED, UNKNOWN, Residency
from engram_runtime.tables.row_ids import count_distinct
from engram_runtime.tables.store import check_row_ids, closed


class MappedTable:
    """A table mapped read-only, all its files side by side.

    Before rows are copied from the map their pages, unless known to be in memory, are read with the errors of reads and
    held against their checksums; where the system had taken one back, once it was copied from.
    Its files are leased: a program that would truncate one waits, and from then on the table is read as `PreadTable`
    does. A page that was evicted and can't be read again still kills the process with SIGBUS, and so does, where the
    system grants no lease, a truncation in the microseconds between the look at the size and the copy: `PreadTable`
    has no such gaps.
    """

    def __init__(
        self,
        spec: TableSpec,
        locate: Locate,
        decoder: RowDecoder,
        *,
        checksums: Checksums = UNCHECKED,
        read: Read = os.preadv,
        open_advice: Callable[[], Advice] = MemoryAdvice,
    ) -> None:
        """Map every file once; ``locate`` tells where on this machine the file of a range is.

        Raises:
            TableError: a file is missing, too short or can't be mapped.
        """
        self._spec = spec
        self._decode = decoder
        self.counters = TableCounters()
        with contextlib.ExitStack() as opened:
            self._files = RecordFiles(spec, locate, read, checksums)
            opened.callback(self._files.close)
            self._files.expect_random_reads()
            self._memory = map_files(self._files)
            self._residency = Residency(self._files.num_bytes, self._files.part_bytes)
            self._advise = open_advice()
            opened.callback(self._advise.close)
            self._close = opened.pop_all().close
        self._files.lease()
        self._base = self._memory.ctypes.data
        self._instead: PreadTable | None = None  # once a file is wanted by another program

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`."""
        check_row_ids(row_ids, self._spec.num_rows)
        if self._instead is None:
            try:
                return self._gather_mapped(row_ids, out)
            except FileWanted as wanted:
                self._instead = self._unmapped()
                warnings.warn(
                    f"table file {wanted} is being changed by another program; its table is no longer mapped but read",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._instead.gather(row_ids, out)

    def _unmapped(self) -> PreadTable:
        """Return what reads the same files, which others may change from now on."""
        self._files.end_leases()
        table = PreadTable(self._spec, self._decode, self._files)
        table.counters = self.counters
        return table

    def _gather_mapped(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        self._residency.forget_old()
        cold, wait_s = 0, 0.0
        for start in range(0, len(row_ids), BLOCK_ROWS):
            stop = start + BLOCK_ROWS
            if stop < len(row_ids):
                self._ask(row_ids[stop : stop + BLOCK_ROWS])
            missed, seconds = self._gather_block(row_ids[start:stop], out[start:stop])
            cold, wait_s = cold + missed, wait_s + seconds
        self.counters.count(row_ids, self._spec.record.record_bytes, cold, wait_s)

    def _gather_block(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> tuple[int, float]:
        """Fill ``out``; returns how many distinct rows were not known to be in memory, and seconds spent for them."""
        addresses = self._files.addresses(row_ids)
        states = self._residency.states(self._residency.pages(addresses))
        cold, wait_s = 0, 0.0
        if states.min() != PRESENT:
            started = time.perf_counter()
            absent = states.min(axis=0) != PRESENT
            cold = self._bring_in(row_ids[absent], addresses[:, absent])
            wait_s = time.perf_counter() - started
        self._files.check(addresses)
        whose = resource.RUSAGE_SELF if len(out) >= SHARED_FROM_ROWS else resource.RUSAGE_THREAD
        faults = resource.getrusage(whose).ru_majflt
        self._decode(self._memory, addresses, out)
        if resource.getrusage(whose).ru_majflt != faults:  # pages that were known had been evicted, and came back
            self._residency.forget()
            self._check_blocks(addresses)
        return cold, wait_s

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`: what is known or asked for already is not asked for again."""
        check_row_ids(row_ids, self._spec.num_rows)
        if self._instead is None:
            self._ask(row_ids)
        else:
            self._instead.request(row_ids)

    def _ask(self, row_ids: NDArray[np.int64]) -> None:
        """Begin to read the rows of which a page is unknown."""
        addresses = self._files.addresses(row_ids)
        pages = self._residency.pages(addresses)
        unknown = self._residency.states(pages) == UNKNOWN
        if unknown.any():
            self._advise(self._residency.ranges(addresses[:, unknown.any(axis=0)], self._base), WILL_NEED)
            self._residency.mark(pages[unknown], REQUESTED)

    def _bring_in(self, row_ids: NDArray[np.int64], addresses: NDArray[np.int64]) -> int:
        """Wait until the rows ``[N]`` at ``[parts, N]`` are in memory, and check them; returns how many differ.

        Raises:
            TableError: the file no longer holds them.
            FileWanted: see `RecordFile.check`.
        """
        ranges = self._residency.ranges(addresses, self._base)
        self._advise(ranges, WILL_NEED)  # all at once, even if requested: a request may be long ago
        count, pages = count_distinct(row_ids), self._residency.pages(addresses)  # while the disk works
        is_known = False
        try:
            self._residency.mark(pages, PRESENT)
            if not (is_populated := self._advise(ranges, POPULATE_READ) == len(ranges)):
                self._read(addresses)
            self._check_blocks(addresses)
            is_known = is_populated
        finally:  # the wait may be interrupted
            if not is_known:
                self._residency.mark(pages, UNKNOWN)
        return count

    def _check_blocks(self, addresses: NDArray[np.int64]) -> None:
        """Hold the blocks in which rows at ``[parts, N]`` lie against their checksums; raises as `_bring_in`."""
        self._files.check(addresses)
        memory = self._memory.data
        begins = self._residency.blocks(addresses)
        for begin, (file, offset) in zip(begins.tolist(), self._files.places(begins), strict=True):
            if file.is_checked:
                _, end = file.blocks(offset, 1)
                file.check_blocks(memory[begin : begin + end - offset], offset)

    def _read(self, addresses: NDArray[np.int64]) -> None:
        """Read rows that the map didn't give: that leaves them in memory, or tells what is wrong, and where."""
        for found, num_bytes in zip(addresses, self._files.part_bytes, strict=True):
            for file, offset in self._files.places(found):
                file.read_into(memoryview(bytearray(num_bytes)), offset)

    def close(self) -> None:
        """Close the files and release the map; a second call does nothing."""
        self._close()
        self._memory, self._decode = np.empty(0, dtype=np.uint8), closed
