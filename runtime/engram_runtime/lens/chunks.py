"""A long text piece by piece."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def chunks(token_ids: NDArray[np.int64], size: int, context: int) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
    """Yield at most ``size`` of ``[T]`` token ids at a time, with up to ``context`` that stand before them."""
    for start in range(0, len(token_ids), size):
        yield token_ids[max(0, start - context) : start].tolist(), token_ids[start : start + size]
