"""Rows of tokens that follow one another, fetched piece by piece by a thread."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows
from engram_runtime.site import Site
from engram_runtime.tables.counters import TableCounters

RowIds = Sequence[NDArray[np.int64]]  # by site, [T, C]
Submit = Callable[[Callable[[], RowIds]], Future[RowIds]]


@dataclass(slots=True, eq=False)
class _Piece:
    """Tokens whose rows are fetched together.

    Attributes:
        stop: where they end in their run.
        early: whether they were fetched before it was known that they come.
        fetched: their row ids, once the rows are in the buffers.
        ready: whether they were when the pass that takes them began; None before that.
    """

    start: int
    stop: int
    early: bool
    fetched: Future[RowIds]
    ready: bool | None = None


class RowRun:
    """The rows of a run of tokens, which passes take from its front.

    Attributes:
        token_ids: of the run.
        taken: how many of them passes took.
    """

    def __init__(self, sites: Sequence[Site], buffers: "RowBuffers", submit: Submit, recent: Sequence[int]) -> None:
        """Begin a run after the tokens ``recent``, which are as many as keyers look back."""
        self._sites, self._buffers, self._submit, self._recent = sites, buffers, submit, list(recent)
        self._context = max(site.keyer.context for site in sites)
        self._pieces: list[_Piece] = []
        self.token_ids: list[int] = []
        self.taken = 0

    @property
    def left(self) -> int:
        """How many tokens no pass took yet."""
        return len(self.token_ids) - self.taken

    def leads_to(self, recent: Sequence[int], token_ids: Sequence[int]) -> bool:
        """Return whether ``token_ids`` after ``recent`` are what is left of the run, or begin with it, or begin it."""
        left = self.token_ids[self.taken :]
        shared = min(len(left), len(token_ids))
        used_up = self.taken > 0 and not left  # what goes on in the same buffers would fill ever longer ones
        alike = left[:shared] == list(token_ids[:shared]) and self._before(self.taken) == list(recent)
        return alike and not used_up

    def extend(self, token_ids: Sequence[int], *, early: bool = False) -> None:
        """Fetch the rows of further tokens; the caller goes on."""
        if not token_ids:
            return
        start = len(self.token_ids)
        self.token_ids += token_ids
        fetch = partial(self._fetch, self._before(start), list(token_ids), start)
        self._pieces.append(_Piece(start, len(self.token_ids), early, self._submit(fetch)))

    def take(self, count: int) -> Mapping[str, PendingRows]:
        """Return the rows of the next ``count`` tokens."""
        start, self.taken = self.taken, self.taken + count
        pieces = [piece for piece in self._pieces if piece.start < self.taken and piece.stop > start]
        for piece in pieces:
            piece.ready = piece.fetched.done() if piece.ready is None else piece.ready

        def copy(name: str, out: NDArray[np.float32]) -> None:
            for piece in pieces:
                piece.fetched.result()
            out[...] = self._buffers.rows[name][start : start + count]

        return {site.name: PendingRows(site.shape(count), partial(copy, site.name)) for site in self._sites}

    def wait(self) -> None:
        """Wait until no thread works for the run."""
        for piece in self._pieces:
            piece.fetched.exception()

    def early(self) -> Mapping[str, TableCounters]:
        """Return by site the counts of rows that were fetched early, once no thread works for the run."""
        early = [piece for piece in self._pieces if piece.early and piece.fetched.exception() is None]
        return {site.name: self._count_early(early, index) for index, site in enumerate(self._sites) if early}

    def _count_early(self, pieces: Sequence[_Piece], site: int) -> TableCounters:
        every, used, ready = set[int](), set[int](), set[int]()
        for piece in pieces:
            row_ids = piece.fetched.result()[site]
            every.update(row_ids.ravel().tolist())
            taken = set(row_ids[: max(0, self.taken - piece.start)].ravel().tolist())
            used |= taken
            ready |= taken if piece.ready else set()
        return TableCounters(early=_rows(every), early_used=_rows(used), early_ready=_rows(ready))

    def _before(self, place: int) -> list[int]:
        """Return as many tokens before a place in the run as keyers look back."""
        known = [*self._recent, *self.token_ids[max(0, place - self._context) : place]]
        return known[max(0, len(known) - self._context) :]

    def _fetch(self, recent: Sequence[int], token_ids: Sequence[int], start: int) -> RowIds:
        ids = np.array(token_ids, dtype=np.int64)
        row_ids = [site.keyer.row_ids(recent, ids) for site in self._sites]
        # One site's rows are waited for while those of the others are on their way.
        for site, wanted in zip(self._sites[1:], row_ids[1:], strict=True):
            site.request(wanted)
        stop = start + len(ids)
        self._buffers.make_room(stop)
        for site, wanted in zip(self._sites, row_ids, strict=True):
            site.gather(wanted, self._buffers.rows[site.name][start:stop])
        return row_ids


def _rows(row_ids: set[int]) -> int:
    return sum(row_id >= 0 for row_id in row_ids)  # without NO_ROW


class RowBuffers:
    """One buffer per site, as long as the longest run so far: faults of fresh pages cost more than rows do.

    Attributes:
        rows: by site, ``[N, C, d]``.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self.rows = {site.name: site.empty(0) for site in sites}

    def make_room(self, count: int) -> None:
        """Have room for the rows of ``count`` tokens, those that are there being kept."""
        for site in self._sites:
            if len(held := self.rows[site.name]) < count:
                longer = site.empty(count)
                longer[: len(held)] = held
                self.rows[site.name] = longer
