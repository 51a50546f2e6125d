"""A table whose rows are changed as they are read; the table below is its owner's, who closes it."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.store import TableStore

Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # rows [N, columns] to others of that shape


class PermutedTable:
    """A table some of whose rows have changed places."""

    def __init__(self, base: TableStore, row_ids: NDArray[np.int64], others: NDArray[np.int64]) -> None:
        """Let each of ``row_ids [R]``, ascending, have the row of the one of ``others [R]`` in its place."""
        self._base, self._row_ids, self._others = base, row_ids, others

    @property
    def counters(self) -> TableCounters:
        """See `TableStore.counters`: those of the table below."""
        return self._base.counters

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`."""
        self._base.gather(self._moved(row_ids), out)

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`."""
        self._base.request(self._moved(row_ids))

    def close(self) -> None:
        """See `TableStore.close`: there is nothing of its own."""

    def _moved(self, row_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        places = np.searchsorted(self._row_ids, row_ids).clip(max=len(self._row_ids) - 1)
        return np.where(self._row_ids[places] == row_ids, self._others[places], row_ids)


class ConvertedTable:
    """A table whose rows go through a function."""

    def __init__(self, base: TableStore, change: Change) -> None:
        self._base, self._change = base, change

    @property
    def counters(self) -> TableCounters:
        """See `TableStore.counters`: those of the table below."""
        return self._base.counters

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """See `TableStore.gather`."""
        self._base.gather(row_ids, out)
        out[...] = self._change(out)

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """See `TableStore.request`."""
        self._base.request(row_ids)

    def close(self) -> None:
        """See `TableStore.close`: there is nothing of its own."""
