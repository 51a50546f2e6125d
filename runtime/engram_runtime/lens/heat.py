"""Where in a table a text reads, over time: reads counted by bucket of rows and span of tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.keyers import NO_ROW
from engram_runtime.lens.trace import Trace, TraceSite

MOST_SPANS, MOST_BUCKETS = 256, 128  # of a strip; about what a screen shows apart
COLOURED = (0.01, 0.999)  # quantiles of counts: a few very hot buckets leave contrast to the others


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeatStrip:
    """The reads of the columns of one n-gram order, whose rows stand side by side.

    Attributes:
        site: whose table is read.
        order: n-gram length.
        tokens: in all spans.
        heads: first row of each column, and behind the last one the end of the strip's rows.
        counts: ``[buckets, spans]`` int64 reads.
        first_touches: ``[spans]`` share of a span's reads that are the first ones of their row; 0 where none is read.
        distinct: rows read.
    """

    site: str
    order: int
    tokens: int
    heads: tuple[int, ...]
    counts: NDArray[np.int64]
    first_touches: NDArray[np.float64]
    distinct: int

    @property
    def reads(self) -> int:
        """Rows read, with repetition."""
        return int(self.counts.sum())

    @property
    def title(self) -> str:
        """What is read, in words."""
        columns, rows = len(self.heads) - 1, self.heads[-1] - self.heads[0]
        return (
            f"{self.site}, {self.order}-grams, {columns} column{'s' if columns > 1 else ''}: {self.reads:,} reads of "
            f"{self.distinct:,} of {rows:,} rows"
        )

    @property
    def colour_range(self) -> tuple[float, float]:
        """Counts for the darkest and the brightest colour, between which most of those above zero lie."""
        low, high = np.quantile(self.counts[self.counts > 0], COLOURED) if self.reads else (1.0, 1.0)
        return float(low), max(float(high), 2 * float(low))

    @property
    def row_edges(self) -> list[int]:
        """Where each bucket's rows begin, and the last one's end."""
        return _edges(self.counts.shape[0], self.heads[-1] - self.heads[0], self.heads[0])

    @property
    def token_edges(self) -> list[int]:
        """Where each span's tokens begin, and the last one's end."""
        return _edges(self.counts.shape[1], self.tokens, 0)


def heat_strips(trace: Trace, site: TraceSite) -> list[HeatStrip]:
    """Return a strip for each n-gram order of a site."""
    num_heads = site.columns // len(site.orders)
    ends = (*site.first_rows, site.num_rows)
    return [
        _strip(trace, site, order, range(first, first + num_heads), ends[first : first + num_heads + 1])
        for order, first in zip(site.orders, range(0, site.columns, num_heads), strict=True)
    ]


def _strip(trace: Trace, site: TraceSite, order: int, columns: range, heads: tuple[int, ...]) -> HeatStrip:
    spans, buckets = min(trace.tokens, MOST_SPANS), min(heads[-1] - heads[0], MOST_BUCKETS)
    counts = np.zeros(buckets * spans, dtype=np.int64)
    firsts = np.zeros(spans, dtype=np.int64)
    for column in columns:
        row_ids = trace.row_ids[site.site][:, column].astype(np.int64)
        tokens = np.flatnonzero(row_ids != NO_ROW)
        span = tokens * spans // trace.tokens
        bucket = (row_ids[tokens] - heads[0]) * buckets // (heads[-1] - heads[0])
        counts += np.bincount(bucket * spans + span, minlength=len(counts))
        _, first = np.unique(row_ids[tokens], return_index=True)
        firsts += np.bincount(span[first], minlength=spans)
    by_bucket = counts.reshape(buckets, spans)
    return HeatStrip(
        site=site.site,
        order=order,
        tokens=trace.tokens,
        heads=heads,
        counts=by_bucket,
        first_touches=firsts / np.maximum(by_bucket.sum(axis=0), 1),
        distinct=int(firsts.sum()),
    )


def _edges(count: int, total: int, start: int) -> list[int]:
    """Return the first of ``total`` numbers from ``start`` on in each of ``count`` parts, and the end."""
    return [start + -(-part * total // count) for part in range(count + 1)]
