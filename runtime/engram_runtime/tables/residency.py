"""Which pages of a table's files are in memory and were checked, as far as is known without asking the kernel."""

import mmap
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.table_spec import CHECKSUM_BLOCK_BYTES
from engram_runtime.tables.regions import reserve

PAGE = mmap.PAGESIZE
KNOWN = CHECKSUM_BLOCK_BYTES  # bytes known or not together: those that are checked together, at most a page
KNOWN_BITS = KNOWN.bit_length() - 1
BLOCK_ROWS = 4096  # are asked for while those before are waited for: their pages, 32 MiB, are in memory together
MOST_AGE_S = 60.0  # kernels that page idle memory out do so after a minute or more
UNKNOWN, REQUESTED, PRESENT = range(3)


class Residency:
    """A byte for each 4 KiB, called a page: nothing known, asked for, or seen in memory and found to be sound.

    The bytes are zeros of the system's that take memory only where they are written, a page for 16 MiB of the table,
    and none after `forget`. They may be wrong, as the kernel takes pages back unasked: that costs time, never rows.
    What was forgotten is checked again when it is wanted again.
    """

    def __init__(self, num_bytes: int, part_bytes: Sequence[int]) -> None:
        """Know nothing of ``num_bytes`` of memory that hold records whose parts have ``part_bytes``."""
        self._map = reserve(-(-num_bytes // KNOWN))
        self._states = np.frombuffer(self._map, dtype=np.uint8)
        self._part_bytes = np.array(part_bytes, dtype=np.int64)[:, None]
        self._since = time.perf_counter()
        # A row whose first, second and last page are known is known: others hold no byte of any other row.
        second = [KNOWN] if max(part_bytes) > KNOWN else []  # otherwise the second page is the last one
        probes = [[min(byte, size - 1) for byte in (0, *second, size)] for size in part_bytes]
        self._probes = np.array(probes, dtype=np.int64)[:, :, None]

    def pages(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``[probes, N]`` pages that tell whether rows are there, of the addresses ``[parts, N]`` of rows."""
        touched: NDArray[np.int64] = addresses[:, None] + self._probes
        touched >>= KNOWN_BITS
        return touched.reshape(self._probes.size, -1)

    def blocks(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``[B]`` addresses, ascending, of all pages that hold rows at ``[parts, N]``."""
        found: set[int] = set()
        for part, (size,) in zip(addresses.tolist(), self._part_bytes.tolist(), strict=True):
            for begin in part:  # of a token's few rows numpy makes ten times the work
                found.update(range(begin >> KNOWN_BITS, ((begin + size - 1) >> KNOWN_BITS) + 1))
        return np.array(sorted(found), dtype=np.int64) << KNOWN_BITS

    def states(self, pages: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return what is known of pages."""
        return self._states.take(pages, mode="clip")

    def mark(self, pages: NDArray[np.int64], state: int) -> None:
        """Say what is known of pages."""
        self._states[pages] = state

    def forget(self) -> None:
        """Know nothing any more."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._since = time.perf_counter()

    def forget_old(self) -> None:
        """Know nothing any more if the oldest knowledge is older than `MOST_AGE_S`."""
        if time.perf_counter() - self._since > MOST_AGE_S:
            self.forget()

    def ranges(self, addresses: NDArray[np.int64], base: int) -> NDArray[np.int64]:
        """Return ``[parts * N, 2]``: where in memory the pages that hold parts at ``[parts, N]`` begin, and bytes.

        The bytes go to the end of the part: the kernel rounds them up to whole pages. ``base`` is address 0 in memory.
        They ascend part by part: 4096 cold rows arrive a tenth sooner than in the order they are wanted.
        """
        found = np.empty((*addresses.shape, 2), dtype=np.int64)
        begins, lengths = found[..., 0], found[..., 1]
        addresses = np.sort(addresses, axis=1)
        np.bitwise_and(addresses, -PAGE, out=begins)
        np.subtract(addresses, begins, out=lengths)
        lengths += self._part_bytes
        begins += base
        return found.reshape(-1, 2)
