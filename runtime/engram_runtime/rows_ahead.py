"""Rows on their way: a thread fetches them while the graph runs towards the sites that read them."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows
from engram_runtime.site import Site

Rows = Mapping[str, NDArray[np.float32]]  # by site, [T, C, d]


class RowsAhead:
    """The rows a sequence reads, in buffers that are used again.

    Row ids depend on tokens and the few before them, not on where in the sequence they stand. So rows fetched ahead are
    taken where exactly these are asked for, and anything else is fetched anew, whatever happened to the sequence.

    Attributes:
        context: how many earlier tokens rows depend on.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self.context = max((site.keyer.context for site in sites), default=0)
        self._current, self._other = _Buffers(sites), _Buffers(sites)
        self._taken: _Fetched | None = None  # what the caller waits for, or has waited for
        self._ahead: _Fetched | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def rows(
        self, history: Sequence[int], token_ids: NDArray[np.int64], following: NDArray[np.int64]
    ) -> Mapping[str, PendingRows]:
        """Return the rows of ``token_ids [T]`` after ``history``, to be used before the next call.

        The thread fetches them, and those of ``following`` after them, while the caller goes on.
        """
        if not self._sites:
            return {}
        recent = self._recent(history)
        taken = self._ahead
        if taken is None or not taken.is_of(recent, token_ids):
            self.settle()
            taken = self._begin(recent, token_ids)
        self._taken, self._ahead = taken, None
        if len(following):
            self._ahead = self._begin(self._recent([*recent, *token_ids.tolist()]), following)
        return taken.pending(self._sites)

    def _begin(self, recent: Sequence[int], token_ids: NDArray[np.int64]) -> "_Fetched":
        self._current, self._other = self._other, self._current
        return _Fetched(recent, token_ids, self._thread().submit(self._fetch, recent, token_ids, self._current))

    def request(self, history: Sequence[int], token_ids: Sequence[int]) -> None:
        """Begin to bring rows into memory without waiting; where that fails, fetching them does and says why."""
        if self._sites:
            self._thread().submit(self._request, self._recent(history), np.array(token_ids, dtype=np.int64))

    def settle(self) -> None:
        """Wait until no thread fills a buffer, and forget what was fetched ahead."""
        for fetched in (self._taken, self._ahead):
            if fetched is not None:
                fetched.rows.exception()
        self._taken = self._ahead = None  # not before: an interrupted wait leaves the thread at work

    def close(self) -> None:
        """End the thread; tables can be closed then."""
        self.settle()
        if self._worker is not None and self._process == os.getpid():
            self._worker.shutdown(cancel_futures=True)
        self._worker = None

    def _recent(self, history: Sequence[int]) -> Sequence[int]:
        return history[max(0, len(history) - self.context) :]

    def _thread(self) -> ThreadPoolExecutor:
        if self._worker is None or self._process != os.getpid():  # threads don't live on in a forked child
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="engram-rows")
            self._process = os.getpid()
        return self._worker

    def _fetch(self, recent: Sequence[int], token_ids: NDArray[np.int64], buffers: "_Buffers") -> Rows:
        row_ids = self._row_ids(recent, token_ids)
        # One site's rows are waited for while those of the others are on their way.
        for site, ids in row_ids[1:]:
            site.request(ids)
        rows = buffers.rows(len(token_ids))
        for site, ids in row_ids:
            site.gather(ids, rows[site.name])
        return rows

    def _request(self, recent: Sequence[int], token_ids: NDArray[np.int64]) -> None:
        for site, ids in self._row_ids(recent, token_ids):
            site.request(ids)

    def _row_ids(self, recent: Sequence[int], token_ids: NDArray[np.int64]) -> list[tuple[Site, NDArray[np.int64]]]:
        return [(site, site.keyer.row_ids(recent, token_ids)) for site in self._sites]


@dataclass(frozen=True, slots=True, eq=False)
class _Fetched:
    """Rows that the thread fetches, and what they depend on: tokens, and as many before them as keyers look back."""

    recent: Sequence[int]
    token_ids: NDArray[np.int64]
    rows: Future[Rows]

    def is_of(self, recent: Sequence[int], token_ids: NDArray[np.int64]) -> bool:
        return self.recent == recent and np.array_equal(self.token_ids, token_ids)

    def pending(self, sites: Sequence[Site]) -> Mapping[str, PendingRows]:
        count = len(self.token_ids)
        return {site.name: PendingRows(site.shape(count), partial(self._copy, site.name)) for site in sites}

    def _copy(self, name: str, out: NDArray[np.float32]) -> None:
        out[...] = self.rows.result()[name]


class _Buffers:
    """One buffer per site, as long as the longest chunk so far: faults of fresh pages cost more than rows do."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._length = 0
        self._rows: Rows = {site.name: site.empty(0) for site in sites}

    def rows(self, count: int) -> Rows:
        """Return room for the rows of ``count`` tokens."""
        if count > self._length:
            self._rows = {site.name: site.empty(count) for site in self._sites}
            self._length = count
        return {name: rows[:count] for name, rows in self._rows.items()}
