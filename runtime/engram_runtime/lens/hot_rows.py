"""The rows a trace reads most often, as many as fit into a part of the page cache, and how they get there."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.lens.addresses import PAGE_BYTES, touched_pages
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.store import TableStore

BATCH_BYTES = 8 << 20  # of float32 rows asked for at a time


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HotRows:
    """Rows of a site: ``row_ids [N]`` int64, the ones read most often first, on so many pages.

    ``served`` is the share of the trace's reads that are reads of them.
    """

    row_ids: NDArray[np.int64]
    pages: int
    served: float


def hot_rows(trace: Trace, site: TraceSite, ram_bytes: int | None) -> HotRows:
    """Return the rows read most often whose pages fit, or all that are read; of equally frequent ones the lower."""
    row_ids, counts = trace.counts(site)
    order = np.argsort(-counts, kind="stable")
    row_ids, counts = row_ids[order], counts[order]
    pages, rows = touched_pages(site.parts, row_ids)
    _, first = np.unique(pages, return_index=True)
    needed = np.cumsum(np.bincount(rows[first], minlength=len(row_ids)))  # pages of the rows up to each
    fitting = len(row_ids)
    if ram_bytes is not None:
        fitting = int(np.searchsorted(needed, ram_bytes // PAGE_BYTES, side="right"))
    return HotRows(
        row_ids=row_ids[:fitting],
        pages=int(needed[fitting - 1]) if fitting else 0,
        served=int(counts[:fitting].sum()) / max(int(counts.sum()), 1),
    )


def bring_in(
    store: TableStore,
    spec: TableSpec,
    row_ids: NDArray[np.int64],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Bring ``[N]`` rows into the page cache and wait for them; the next batch is asked for meanwhile.

    Args:
        progress: told the rows of each batch.

    Raises:
        TableError: a file doesn't hold what the manifest says.
    """
    size = max(1, BATCH_BYTES // (4 * spec.record.columns))
    batches = [np.sort(row_ids[start : start + size]) for start in range(0, len(row_ids), size)]
    rows = np.empty((min(size, len(row_ids)), spec.record.columns), dtype=np.float32)
    for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=row_ids[:0]):
        store.request(following)
        store.gather(batch, rows[: len(batch)])
        progress(len(batch))
