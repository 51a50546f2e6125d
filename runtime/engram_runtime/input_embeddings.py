"""Positions of a sequence that were given as input embeddings in place of tokens."""

import numpy as np
from numpy.typing import NDArray


class InputEmbeddings:
    """The embeddings by position; they are kept, as a position may have to be computed again."""

    def __init__(self, width: int) -> None:
        """Keep embeddings of ``width`` values."""
        self._width = width
        self._parts: list[tuple[int, NDArray[np.float32]]] = []  # where each begins, in order, none reaching the next

    def put(self, start: int, embeddings: NDArray[np.float32]) -> None:
        """Keep a copy of ``[T, width]`` for the positions from ``start``, and forget what was kept from there on."""
        kept = [(begin, part[: start - begin]) for begin, part in self._parts if begin < start]
        self._parts = [*kept, (start, embeddings.copy())]

    def of(self, start: int, count: int) -> NDArray[np.float32]:
        """Return ``[count, width]`` of the positions from ``start``; zeros where none were given."""
        out = np.zeros((count, self._width), dtype=np.float32)
        for begin, part in self._parts:
            first, last = max(begin, start), min(begin + len(part), start + count)
            if first < last:
                out[first - start : last - start] = part[first - begin : last - begin]
        return out
