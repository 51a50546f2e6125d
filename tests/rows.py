"""Rows of tables in fresh arrays, for tests that look at them once."""

import numpy as np
from numpy.typing import NDArray

from engram_runtime.tables.store import TableStore


def gathered(table: TableStore, columns: int, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows ``[N, columns]`` of ``[N]`` ids."""
    out = np.full((len(row_ids), columns), np.nan, dtype=np.float32)
    table.gather(row_ids, out)
    return out
