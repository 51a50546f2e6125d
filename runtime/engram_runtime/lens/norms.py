"""How long rows are: a histogram in fine logarithmic steps that takes any number of them."""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

STEPS = 64  # a doubling: a quantile is off by at most 0.6 %
LEAST, MOST = -160, 160  # powers of two around every norm that rows of float32 can have


def row_norms(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the Euclidean norm of each of ``[N, columns]`` rows; NaN or infinite where one of its values is."""
    norms: NDArray[np.float64] = np.sqrt(np.einsum("nc,nc->n", values, values, dtype=np.float64))
    return norms


@dataclass(slots=True, eq=False)
class NormHistogram:
    """Counts of positive finite norms; ``least`` and ``most`` are exact, all between is known to a step."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((MOST - LEAST) * STEPS, dtype=np.int64))
    least: float = np.inf
    most: float = 0.0

    def add(self, norms: NDArray[np.float64]) -> None:
        """Count ``[N]`` norms."""
        if not len(norms):
            return
        steps = np.floor(np.log2(norms) * STEPS).astype(np.int64) - LEAST * STEPS
        self.counts += np.bincount(steps, minlength=len(self.counts))
        self.least, self.most = min(self.least, float(norms.min())), max(self.most, float(norms.max()))

    def __add__(self, other: Self) -> Self:
        """Return the histogram of both sets of norms."""
        return type(self)(self.counts + other.counts, min(self.least, other.least), max(self.most, other.most))

    @property
    def total(self) -> int:
        """Norms counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Return the norm that ``share`` of all do not exceed, of at least one."""
        rank = max(1, int(np.ceil(share * self.total)))
        step = int(np.searchsorted(np.cumsum(self.counts), rank))
        middle = 2.0 ** ((step + 0.5) / STEPS + LEAST)
        return float(np.clip(middle, self.least, self.most))

    def bars(self, most: int) -> list[tuple[float, float, int]]:
        """Return at most so many (from, to, count) between the smallest and the largest norm, each as wide in steps."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return []
        first, width = int(used[0]), -(-(int(used[-1]) - int(used[0]) + 1) // most)
        starts = range(first, int(used[-1]) + 1, width)
        edges = [2.0 ** (step / STEPS + LEAST) for step in (*starts, starts[-1] + width)]
        sums = [int(self.counts[start : start + width].sum()) for start in starts]
        return list(zip(edges[:-1], edges[1:], sums, strict=True))
