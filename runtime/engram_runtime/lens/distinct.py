"""Counts records that are exact copies of others, in bounded memory."""

import numpy as np
from numpy.typing import NDArray

from engram_runtime.lens.mixing import in_sample

MOST_HASHES = 4_000_000  # 8 bytes each; of tables with more rows a share of the records is compared
ROOM = 1 << 20  # for hashes that are not known to be distinct yet: more than a block has


class DistinctRecords:
    """Counts distinct records by 64-bit hashes, all or those whose hash lies in a share of the range.

    Copies have one hash, so they are kept or left out together.

    Attributes:
        rate: share of the records that is compared.
        compared: records compared so far.
    """

    def __init__(self, num_rows: int) -> None:
        """Prepare for a number of records."""
        self.rate = min(1.0, MOST_HASHES / num_rows)
        self.compared = 0
        self._hashes = np.empty(min(num_rows, MOST_HASHES + MOST_HASHES // 64 + ROOM), dtype=np.uint64)
        self._filled = 0

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Take the hashes of at most `ROOM` records."""
        kept = hashes if self.rate == 1 else hashes[in_sample(hashes, self.rate)]
        if self._filled + len(kept) > len(self._hashes):
            self._forget_copies()
        self._hashes[self._filled : self._filled + len(kept)] = kept
        self._filled += len(kept)
        self.compared += len(kept)

    @property
    def copies(self) -> int:
        """Records compared that an earlier one equals."""
        self._forget_copies()
        return self.compared - self._filled

    def _forget_copies(self) -> None:
        hashes = self._hashes[: self._filled]
        hashes.sort()
        distinct = hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes
        self._filled = len(distinct)
        self._hashes[: self._filled] = distinct
