"""Row decoders made of a compiled library's functions."""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TvmRowDecoder:
    """A `RowDecoder` that calls a function of a library, see `engram_runtime.library.row_function`.

    Rows are shared among the threads of the library's pool where they are many. It doesn't keep the memory of a table
    alive: a store can unmap it.
    """

    def __init__(
        self, function: Callable[..., None], as_tensor: Callable[[NDArray[Any]], Any], claim_threads: Callable[[], None]
    ) -> None:
        self._function = function
        self._as_tensor = as_tensor
        self._claim_threads = claim_threads
        self._known: Callable[[], NDArray[np.uint8] | None] = lambda: None
        self._memory: Any = None

    def __call__(self, memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `RowDecoder`."""
        if len(out) == 0:
            return
        if self._known() is not memory:
            self._known, self._memory = weakref.ref(memory), self._as_tensor(_same_bytes(memory))
        self._claim_threads()
        self._function(self._memory, self._as_tensor(offsets), self._as_tensor(out))


def _same_bytes(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the same bytes as an array that owns nothing and may be read-only memory, which DLPack would refuse."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * len(memory)).from_address(memory.ctypes.data))
