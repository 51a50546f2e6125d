"""Row decoders made of a compiled library's functions."""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.tables.decoding import SHARED_FROM_ROWS

ALONE_ROWS = SHARED_FROM_ROWS - 1  # the most that the library's function doesn't share


class TvmRowDecoder:
    """A `RowDecoder` that calls a function of a library, see `engram_runtime.library.row_function`.

    Many rows are shared among the threads of the library's pool, unless a step needs those. It doesn't keep the memory
    of a table alive: a store can unmap it.
    """

    def __init__(
        self, function: Callable[..., None], as_tensor: Callable[[NDArray[Any]], Any], claim_pool: Callable[[], bool]
    ) -> None:
        """Call ``function`` with ``as_tensor`` of each array; ``claim_pool`` tells whether its rows may be shared."""
        self._function = function
        self._as_tensor = as_tensor
        self._claim_pool = claim_pool
        self._known: Callable[[], NDArray[np.uint8] | None] = lambda: None
        self._memory: Any = None

    def __call__(self, memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `RowDecoder`."""
        if len(out) == 0:
            return
        if self._known() is not memory:
            self._known, self._memory = weakref.ref(memory), self._as_tensor(_same_bytes(memory))
        if len(out) < SHARED_FROM_ROWS or self._claim_pool():
            self._decode(offsets, out)
            return
        for start in range(0, len(out), ALONE_ROWS):
            rows = slice(start, start + ALONE_ROWS)
            self._decode(np.ascontiguousarray(offsets[:, rows]), out[rows])

    def _decode(self, offsets: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        self._function(self._memory, self._as_tensor(offsets), self._as_tensor(out))


def _same_bytes(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the same bytes as an array that owns nothing and may be read-only memory, which DLPack would refuse."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * len(memory)).from_address(memory.ctypes.data))
