"""The rows of several sequences' next tokens, asked for at once."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows
from engram_runtime.site import Site

Rows = Mapping[str, NDArray[np.float32]]  # by site, [B, C, d]


class JointRows:
    """Fetches rows in a thread while the graph runs towards the sites that read them; each distinct row once."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._context = max((site.keyer.context for site in sites), default=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-rows")

    def rows(self, histories: Sequence[Sequence[int]], token_ids: NDArray[np.int64]) -> Mapping[str, PendingRows]:
        """Return the rows of ``token_ids [B]``, each after a history of its own."""
        if not self._sites:
            return {}
        recent = [history[max(0, len(history) - self._context) :] for history in histories]
        fetched = self._thread.submit(self._fetch, recent, token_ids)
        count = len(token_ids)
        return {site.name: PendingRows(site.shape(count), partial(_copy, fetched, site.name)) for site in self._sites}

    def _fetch(self, recent: Sequence[Sequence[int]], token_ids: NDArray[np.int64]) -> Rows:
        row_ids = [(site, _row_ids(site, recent, token_ids)) for site in self._sites]
        # One site's rows are waited for while those of the others are on their way.
        for site, ids in row_ids[1:]:
            site.request(ids)
        rows = {site.name: site.empty(len(token_ids)) for site in self._sites}
        for site, ids in row_ids:
            site.gather(ids, rows[site.name])
        return rows

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def _row_ids(site: Site, recent: Sequence[Sequence[int]], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``[B, C]`` row ids."""
    each = [site.keyer.row_ids(before, token_ids[i : i + 1]) for i, before in enumerate(recent)]
    return np.concatenate(each)


def _copy(fetched: Future[Rows], name: str, out: NDArray[np.float32]) -> None:
    out[...] = fetched.result()[name]
