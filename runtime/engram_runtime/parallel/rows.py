"""The rows of several sequences' next tokens, asked for at once."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows
from engram_runtime.site import Site

RowIds = Mapping[str, NDArray[np.int64]]  # by site, [R, C]
Fetched = tuple[RowIds, Mapping[str, NDArray[np.float32]]]  # and the rows by site, [R, C, d]


@dataclass(frozen=True, slots=True, eq=False)
class JointRequest:
    """Rows that are on their way."""

    sites: Sequence[Site]
    fetched: Future[Fetched]

    def part(self, part: slice) -> Mapping[str, PendingRows]:
        """Return some of them, for a pass."""
        count = part.stop - part.start
        return {site.name: PendingRows(site.shape(count), partial(self._copy, site.name, part)) for site in self.sites}

    @property
    def row_ids(self) -> RowIds:
        """Ids of all of them, waited for."""
        return self.fetched.result()[0]

    def _copy(self, name: str, part: slice, out: NDArray[np.float32]) -> None:
        out[...] = self.fetched.result()[1][name][part]


class JointRows:
    """Fetches rows in a thread while the graph runs towards the sites that read them; each distinct row once."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._context = max((site.keyer.context for site in sites), default=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-rows")

    def request(self, histories: Sequence[Sequence[int]], blocks: Sequence[Sequence[int]]) -> JointRequest:
        """Ask for the rows of blocks of tokens, each after a history of its own; R is the number of all tokens."""
        recent = [history[max(0, len(history) - self._context) :] for history in histories]
        return JointRequest(self._sites, self._thread.submit(self._fetch, recent, blocks))

    def _fetch(self, recent: Sequence[Sequence[int]], blocks: Sequence[Sequence[int]]) -> Fetched:
        row_ids = [(site, _row_ids(site, recent, blocks)) for site in self._sites]
        # One site's rows are waited for while those of the others are on their way.
        for site, ids in row_ids[1:]:
            site.request(ids)
        rows = {site.name: site.empty(len(ids)) for site, ids in row_ids}
        for site, ids in row_ids:
            site.gather(ids, rows[site.name])
        return {site.name: ids for site, ids in row_ids}, rows

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def _row_ids(site: Site, recent: Sequence[Sequence[int]], blocks: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return ``[R, C]`` row ids."""
    each = [site.keyer.row_ids(before, np.array(block)) for before, block in zip(recent, blocks, strict=True)]
    return np.concatenate(each)
