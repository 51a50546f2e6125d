"""A place in the model that reads a table."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.keyers import NO_ROW, Keyer
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.policy import TableChoice
from engram_runtime.tables.store import TableStore


class Site:
    """A keyer and the store its row ids lead to; ``choice`` tells why that store, where there was a choice."""

    def __init__(self, spec: TableSpec, keyer: Keyer, table: TableStore, choice: TableChoice | None = None) -> None:
        self.choice = choice
        self.name = spec.site
        self.spec = spec
        self.keyer = keyer
        self.table = table

    def rows(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``[T, C, d]`` float32 rows of each token, a fresh array; zeros for tokens that read none."""
        row_ids = self.keyer.row_ids(history, token_ids)
        rows = self.empty(len(token_ids))
        self.gather(row_ids, rows)
        return rows

    def empty(self, count: int) -> NDArray[np.float32]:
        """Return room for the rows of ``count`` tokens, ``[count, C, d]``."""
        return np.empty(self.shape(count), dtype=np.float32)

    def shape(self, count: int) -> tuple[int, int, int]:
        """Return ``[count, C, d]``."""
        return count, self.keyer.columns, self.spec.record.columns

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Fill ``out [T, C, d]``, the caller's and contiguous, with the rows of ``[T, C]`` ids; zeros for `NO_ROW`."""
        if row_ids.min(initial=0) > NO_ROW:
            self.table.gather(row_ids.ravel(), out.reshape(-1, out.shape[-1]))
            return
        found = row_ids != NO_ROW
        some = np.empty((int(found.sum()), out.shape[-1]), dtype=np.float32)
        self.table.gather(row_ids[found], some)
        out[found], out[~found] = some, 0

    def request(self, row_ids: NDArray[np.int64]) -> None:
        """Begin to bring the rows of ids of any shape into memory, each once."""
        self.table.request(np.unique(row_ids[row_ids != NO_ROW]))
