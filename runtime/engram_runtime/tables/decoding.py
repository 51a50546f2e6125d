"""Records of a table to float32 rows."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class RowDecoder(Protocol):
    """Turns records that lie anywhere in memory into rows."""

    def __call__(self, memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Fill ``out [N, columns]``, contiguous, with the rows whose part p begins at ``memory[offsets[p, i]]``.

        Args:
            memory: ``[bytes]``; the same object at every call of a table, so what is made of it can be kept.
            offsets: ``[parts, N]``, contiguous; they are trusted.
        """
        ...
