"""Rows of the tokens after those the graph runs on, fetched by a thread meanwhile."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.site import Site

Rows = Mapping[str, NDArray[np.float32]]  # by site, [T, C, d]


class RowsAhead:
    """The rows a sequence reads, in buffers that are used again.

    Row ids depend on tokens and the few before them, not on where in the sequence they stand. So rows fetched ahead are
    taken where exactly these are asked for, and anything else is fetched anew, whatever happened to the sequence.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._context = max((site.keyer.context for site in sites), default=0)
        self._current, self._other = _Buffers(sites), _Buffers(sites)
        self._ahead: _Ahead | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def rows(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> Rows:
        """Return the rows of ``token_ids [T]`` after ``history``; the second next call overwrites them.

        Raises:
            TableError: a table no longer holds what the manifest says.
        """
        recent = self._recent(history)
        ahead = self.settle()
        if ahead is not None and ahead.is_of(recent, token_ids):
            return ahead.rows.result()
        return self._fetch(recent, token_ids, self._next_buffers())

    def begin(self, history: Sequence[int], token_ids: NDArray[np.int64], following: NDArray[np.int64]) -> None:
        """Begin to fetch the rows of ``following``, which stand after ``token_ids``, whose rows were asked for last."""
        if self._sites:
            recent = self._recent([*self._recent(history), *token_ids.tolist()])
            rows = self._thread().submit(self._fetch, recent, following, self._next_buffers())
            self._ahead = _Ahead(recent, following, rows)

    def request(self, history: Sequence[int], token_ids: Sequence[int]) -> None:
        """Begin to bring rows into memory without waiting; where that fails, fetching them does and says why."""
        if self._sites:
            self._thread().submit(self._request, self._recent(history), np.array(token_ids, dtype=np.int64))

    def settle(self) -> "_Ahead | None":
        """Wait until no thread fills a buffer, and return what was fetched ahead and not asked for."""
        ahead = self._ahead
        if ahead is not None:
            ahead.rows.exception()
            self._ahead = None  # not before: an interrupted wait leaves the thread at work
        return ahead

    def close(self) -> None:
        """End the thread; tables can be closed then."""
        self.settle()
        if self._worker is not None and self._process == os.getpid():
            self._worker.shutdown(cancel_futures=True)
        self._worker = None

    def _recent(self, history: Sequence[int]) -> Sequence[int]:
        return history[max(0, len(history) - self._context) :]

    def _next_buffers(self) -> "_Buffers":
        self._current, self._other = self._other, self._current
        return self._current

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
class _Ahead:
    """Rows that are being fetched, and what they depend on: tokens, and as many before them as keyers look back."""

    recent: Sequence[int]
    token_ids: NDArray[np.int64]
    rows: Future[Rows]

    def is_of(self, recent: Sequence[int], token_ids: NDArray[np.int64]) -> bool:
        return self.recent == recent and np.array_equal(self.token_ids, token_ids)


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
