"""Rows on their way: a thread fetches them while the graph runs towards the sites that read them."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows
from engram_runtime.fetched_rows import RowBuffers, RowIds, RowRun
from engram_runtime.site import Site
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.options import RESIDENT


class RowsAhead:
    """The rows a sequence reads, in buffers that are used again.

    Row ids depend on tokens and the few before them, not on where in the sequence they stand. So rows fetched ahead are
    taken where exactly these are asked for, and anything else is fetched anew, whatever happened to the sequence.

    Attributes:
        context: how many earlier tokens rows depend on.
        early: by site, what was fetched because of `request`.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        # Rows in memory are there when they are needed: a thread that copied them early would only take the drafter's
        # time, a fifth of a millisecond a draft on two cores.
        self._slow = any(site.choice is None or site.choice.io != RESIDENT for site in sites)
        self.context = max((site.keyer.context for site in sites), default=0)
        self.early = {site.name: TableCounters() for site in sites}
        self._buffers, self._other = RowBuffers(sites), RowBuffers(sites)
        self._runs: list[RowRun] = []  # that the thread may work for, the last one going on
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
        wanted = token_ids.tolist()
        run = self._run(history, wanted)
        if run is None:
            self.settle()
            run = self._begin(history)
        run.extend(wanted[run.left :])
        rows = run.take(len(wanted))
        if len(following):
            known, coming = [*history, *wanted], following.tolist()
            after = self._run(known, coming) or self._begin(known)
            after.extend(coming[after.left :])
        return rows

    def request(self, history: Sequence[int], token_ids: Sequence[int]) -> None:
        """Fetch rows that may be asked for next; where that fails, asking for them does and says why.

        Those of the tokens that the last request began with as well are on their way already. Nothing is done where all
        tables are in memory.
        """
        if self._slow:
            run = self._run(history, token_ids) or self._begin(history)
            run.extend(token_ids[run.left :], early=True)

    def _run(self, history: Sequence[int], token_ids: Sequence[int]) -> RowRun | None:
        """Return the run that goes on with tokens, or may."""
        runs = self._runs[-1:] if self._process == os.getpid() else []
        return next((run for run in runs if run.leads_to(self._recent(history), token_ids)), None)

    def _begin(self, history: Sequence[int]) -> RowRun:
        self._buffers, self._other = self._other, self._buffers
        self._runs.append(RowRun(self._sites, self._buffers, self._submit, self._recent(history)))
        return self._runs[-1]

    def settle(self) -> None:
        """Wait until no thread fills a buffer, and forget what was fetched ahead."""
        if self._process == os.getpid():  # else the thread didn't live on in this forked child
            for run in self._runs:
                run.wait()
            for run in self._runs:
                for site, counts in run.early().items():
                    self.early[site] += counts
        self._runs = []  # not before: an interrupted wait leaves the thread at work

    def close(self) -> None:
        """End the thread; tables can be closed then."""
        self.settle()
        if self._worker is not None and self._process == os.getpid():
            self._worker.shutdown(cancel_futures=True)
        self._worker = None

    def _recent(self, history: Sequence[int]) -> Sequence[int]:
        return history[max(0, len(history) - self.context) :]

    def _submit(self, fetch: Callable[[], RowIds]) -> Future[RowIds]:
        if self._worker is None or self._process != os.getpid():
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="engram-rows")
            self._process = os.getpid()
        return self._worker.submit(fetch)
