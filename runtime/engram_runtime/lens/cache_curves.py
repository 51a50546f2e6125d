"""What caches would serve of a site's reads: of rows packed side by side, and of the pages they are on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TableError
from engram_runtime.lens.addresses import PAGE_BYTES, touched_pages
from engram_runtime.lens.miss_ratio import MissRatioCurve, miss_ratio_curve, sample_rate
from engram_runtime.lens.shares import format_share
from engram_runtime.lens.stack_distances import Progress, no_progress
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.sizes import format_size

SMALLEST_CACHE_BYTES = 64 << 10
NEARLY = 0.95  # of what a cache of any size serves: what is said of a curve in one number
ROW, PAGE = "row", "page"
UNITS = (ROW, PAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCurve:
    """What caches would serve that hold rows packed side by side (``row``) or the pages they are on (``page``).

    Attributes:
        unit: one of `UNITS`; a page counts as read once for each row that is read from it.
        unit_bytes: bytes of one.
        sizes: of caches in bytes, doubling until everything that is read fits.
        hit_rates: share of the reads that a cache of each size serves.
    """

    unit: str
    unit_bytes: int
    curve: MissRatioCurve
    sizes: tuple[int, ...]
    hit_rates: tuple[float, ...]

    @property
    def enough(self) -> int | None:
        """The smallest size that serves `NEARLY` what any does, or None where nothing is read twice."""
        if not self.curve.ceiling:
            return None
        least = NEARLY * self.curve.ceiling
        return next(size for size, rate in zip(self.sizes, self.hit_rates, strict=True) if rate >= least)

    @property
    def verdict(self) -> str:
        """What caches would serve, in words."""
        if self.enough is None:
            return f"no {self.unit} is read twice: no cache of {self.unit}s serves anything"
        served = self.hit_rates[self.sizes.index(self.enough)]
        return (
            f"{format_size(self.enough)} of {self.unit}s would serve {format_share(served)} of the reads, and no cache "
            f"of {self.unit}s more than {format_share(self.curve.ceiling)}: the other "
            f"{format_share(self.curve.first_touches)} are first touches"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON values."""
        return {
            "unit": self.unit,
            "unit_bytes": self.unit_bytes,
            "reads": self.curve.accesses,
            "distinct": self.curve.distinct,
            "sample_rate": self.curve.rate,
            "first_touches": self.curve.first_touches,
            "cache_bytes": list(self.sizes),
            "hit_rates": list(self.hit_rates),
            "enough_bytes": self.enough,
            "verdict": self.verdict,
        }


def cache_curve(
    trace: Trace, site: TraceSite, unit: str, rate: float | None, progress: Progress = no_progress
) -> CacheCurve:
    """Return the curve of a site's reads.

    Args:
        rate: share of the rows or pages that is looked at; None takes what `sample_rate` says.
        progress: see `stack_distances`.

    Raises:
        TableError: no row is read at all, or none of the sample.
    """
    num_reads = trace.num_reads(site)
    if not num_reads:
        raise TableError(f"the trace reads no row of site {site.site}; record one of another text")
    if rate is None:  # a large row is read from many pages
        rate = sample_rate(num_reads if unit == ROW else sum(map(len, _blocks(trace, site, unit))))
    curve = miss_ratio_curve(_blocks(trace, site, unit), rate, progress)
    if not curve.sampled:
        raise TableError(
            f"a sample of {curve.rate} has none of the {num_reads} reads of site {site.site}; use a larger one"
        )
    unit_bytes = site.record_bytes if unit == ROW else PAGE_BYTES
    sizes = _doublings(curve.distinct * unit_bytes)
    hit_rates = curve.hit_rates([size // unit_bytes for size in sizes])
    return CacheCurve(unit=unit, unit_bytes=unit_bytes, curve=curve, sizes=sizes, hit_rates=tuple(hit_rates))


def _blocks(trace: Trace, site: TraceSite, unit: str) -> Iterator[NDArray[np.int64]]:
    if unit == ROW:
        return trace.blocks(site)
    return (touched_pages(site.parts, block)[0] for block in trace.blocks(site))


def _doublings(least: int) -> tuple[int, ...]:
    """Return `SMALLEST_CACHE_BYTES` and its doublings up to the first that is not below ``least``."""
    count = max(0, (-(-least // SMALLEST_CACHE_BYTES) - 1).bit_length())
    return tuple(SMALLEST_CACHE_BYTES << doubling for doubling in range(count + 1))
