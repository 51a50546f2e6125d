"""Records of a table to float32 rows."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_runtime.records import RecordFormat

BLOCK_BYTES = 512 << 10  # of rows decoded at a time: with their records they stay in a core's cache
SHARED_FROM_ROWS = 256  # compiled decoders may share so many among threads: about 10 us of work on one


class RowDecoder(Protocol):
    """Turns records that lie anywhere in memory into rows, many (`SHARED_FROM_ROWS`) maybe on several threads."""

    def __call__(self, memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Fill ``out [N, columns]``, contiguous, with the rows whose part p begins at ``memory[offsets[p, i]]``.

        Args:
            memory: ``[bytes]``; the same object at every call of a table, so what is made of it can be kept.
            offsets: ``[parts, N]``, contiguous; they are trusted.
        """
        ...


class NumpyRowDecoder:
    """Decodes with numpy, a block of rows at a time."""

    def __init__(self, record: RecordFormat, part_bytes: Sequence[int]) -> None:
        """Decode records whose parts, one after another, have ``part_bytes`` bytes."""
        self._record = record
        self._items = [np.dtype((np.void, num_bytes)) for num_bytes in part_bytes]
        self._block = max(1, BLOCK_BYTES // (4 * record.columns))
        self._memory: NDArray[np.uint8] | None = None
        self._views: list[NDArray[np.void]] = []

    def __call__(self, memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `RowDecoder`."""
        if memory is not self._memory:
            self._memory, self._views = memory, [_at_every_byte(memory, item) for item in self._items]
        for start in range(0, len(out), self._block):
            stop = start + self._block
            self._record.decode_into(self._records(offsets[:, start:stop]), out[start:stop])

    def _records(self, offsets: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return ``[N, record_bytes]``."""
        parts = [
            view[found].view(np.uint8).reshape(len(found), view.itemsize)
            for view, found in zip(self._views, offsets, strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _at_every_byte(memory: NDArray[np.uint8], item: np.dtype[np.void]) -> NDArray[np.void]:
    """Return a view whose element i is the item that begins at byte i: to index it is to copy items from anywhere."""
    return np.ndarray((len(memory) - item.itemsize + 1,), dtype=item, buffer=memory, strides=(1,))
