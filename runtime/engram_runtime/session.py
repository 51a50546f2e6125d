"""One sequence: token ids in, logits out, with rows fetched and caches kept."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.activity import Activity, SiteActivity
from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor, StepInputs, allocate_states, empty_rows
from engram_runtime.keyers import NO_ROW, Keyer
from engram_runtime.manifest import ACTIVITY
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.opening import open_table
from engram_runtime.tables.store import TableStore


class Site:
    """A place in the model that reads a table: its keyer and its store."""

    def __init__(self, spec: TableSpec, keyer: Keyer, table: TableStore) -> None:
        self.name = spec.site
        self.spec = spec
        self.keyer = keyer
        self.table = table

    def rows(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``[T, C, d]`` float32 rows of each token; zeros for tokens that read none."""
        row_ids = self.keyer.row_ids(history, token_ids)
        found = row_ids != NO_ROW
        rows = np.empty((*row_ids.shape, self.spec.record.columns), dtype=np.float32)
        if found.all():
            self.table.gather(row_ids.ravel(), rows.reshape(-1, self.spec.record.columns))
            return rows
        some = np.empty((int(found.sum()), self.spec.record.columns), dtype=np.float32)
        self.table.gather(row_ids[found], some)
        rows[found], rows[~found] = some, 0
        return rows


def open_sites(bundle: Bundle) -> list[Site]:
    """Open every table of a bundle, or none where one can't be opened; the caller closes their stores."""
    with contextlib.ExitStack() as opened:
        sites = []
        for spec in bundle.manifest.tables:
            site = Site(spec, bundle.keyer(spec.keyer), open_table(bundle, spec))
            opened.callback(site.table.close)
            sites.append(site)
        opened.pop_all()
    return sites


def close_sites(sites: Sequence[Site]) -> None:
    """Close the tables of sites."""
    for site in sites:
        site.table.close()


class Session:
    """The state of one sequence; close it to release its tables."""

    def __init__(self, bundle: Bundle, executor: Executor, sites: Sequence[Site], *, tables_on: bool = True) -> None:
        """Start an empty sequence.

        Args:
            tables_on: False feeds zero rows. Engram sites then add nothing; Gemma's per-layer inputs are left with the
                projection of the token's embedding, at the scale it has beside rows.
        """
        self._model = bundle.manifest.model
        specs = bundle.manifest.decoder.states
        self._executor = executor
        self._sites = sites
        self._tables_on = tables_on
        states = allocate_states(specs, executor.float16_states)
        self._one_way = [states[spec.name] for spec in specs if not spec.rolls_back]
        self._step = executor.bind(states)
        self._token_ids: list[int] = []
        self._stale = False  # whether states may hold other tokens than `token_ids`

    @classmethod
    def open(cls, bundle: Bundle, executor: Executor, *, tables_on: bool = True) -> Self:
        """Open a bundle's tables and start an empty sequence; the tables are closed where it can't start."""
        with contextlib.ExitStack() as opened:
            sites = open_sites(bundle)
            opened.callback(close_sites, sites)
            session = cls(bundle, executor, sites, tables_on=tables_on)
            opened.pop_all()
        return session

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of all tokens the states hold: a view that grows with the sequence, not to be changed."""
        return self._token_ids

    @property
    def activity(self) -> Activity:
        """What gated sites did to the tokens of the last forward pass: one, a draft, or a chunk of a longer text.

        By site; empty before the first pass, and of a bundle whose graph doesn't say it.
        """
        return {name.removeprefix(ACTIVITY): SiteActivity(told) for name, told in self._step.activity.items()}

    @property
    def room(self) -> int:
        """How many more tokens the context holds."""
        return self._model.context_length - len(self)

    def __len__(self) -> int:
        return len(self._token_ids)

    def prefill(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Add tokens and return the logits ``[V]`` after the last one.

        Raises:
            RequestError: no token, an id outside the vocabulary, or more tokens than the context holds.
        """
        logits = np.empty(0, dtype=np.float32)
        for chunk in self._forward(token_ids, every_position=False):
            logits = chunk[-1]
        return logits

    def decode(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Add k tokens and return the logits ``[k, V]`` after each of them.

        Raises:
            RequestError: as for `prefill`.
        """
        first, *others = self._forward(token_ids, every_position=True)
        return np.concatenate([first, *others]) if others else first

    def logits(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Add tokens and yield the logits of every position, ``[chunk, V]`` at a time."""
        return self._forward(token_ids, every_position=True)

    def trim(self, count: int) -> int:
        """Forget the last ``count`` tokens, as if they had never been added; returns how many were computed again.

        States without an entry per position can't step back, so with them the kept tokens are computed again.
        """
        if not 0 <= count <= len(self):
            raise RequestError(f"can't trim {count} tokens of a sequence of {len(self)}")
        if count:
            self._stale = True
            self._token_ids = self._token_ids[:-count]
        return self._restore()

    def _forward(self, token_ids: Sequence[int], *, every_position: bool) -> Iterator[NDArray[np.float32]]:
        ids = self._checked(token_ids)
        self._restore()
        for chunk in self._chunks(ids):
            inputs = self._inputs(self._token_ids, chunk, every_position=every_position)
            self._stale = True  # until the books are kept: a step that is interrupted may have changed the states
            logits = self._step(inputs)
            self._token_ids += chunk.tolist()
            self._stale = False
            yield logits

    def _restore(self) -> int:
        """Make the states hold `token_ids` alone; returns how many tokens were computed again for that."""
        if not self._stale:
            return 0
        for state in self._one_way:
            state[...] = 0
        again = self._token_ids if self._one_way else []
        start = 0
        for chunk in self._chunks(np.asarray(again, dtype=np.int64)):
            self._step(self._inputs(again[:start], chunk, every_position=False))
            start += len(chunk)
        self._stale = False
        return len(again)

    def _chunks(self, token_ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        start = 0
        for size in self._executor.chunks(len(token_ids)):
            yield token_ids[start : start + size]
            start += size

    def _inputs(self, history: Sequence[int], token_ids: NDArray[np.int64], *, every_position: bool) -> StepInputs:
        """Return the inputs of a pass over ``token_ids [T]`` after ``history``."""
        count = len(token_ids)
        return StepInputs(
            token_ids=token_ids,
            position=len(history),
            logit_rows=np.arange(0 if every_position else count - 1, count, dtype=np.int64),
            rows=self._rows(history, token_ids),
        )

    def _rows(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> Mapping[str, NDArray[np.float32]]:
        if self._tables_on:
            return {site.name: site.rows(history, token_ids) for site in self._sites}
        return {site.name: empty_rows(site.spec, len(token_ids)) for site in self._sites}

    def _checked(self, token_ids: Sequence[int]) -> NDArray[np.int64]:
        for token_id in token_ids:
            if not 0 <= token_id < self._model.vocab_size:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {self._model.vocab_size}")
        ids = np.asarray(token_ids, dtype=np.int64)
        if len(ids) == 0:
            raise RequestError("no tokens were given; the model needs at least one")
        if (total := len(self) + len(ids)) > self._model.context_length:
            raise RequestError(f"{total} tokens exceed the context of {self._model.context_length}; shorten the prompt")
        return ids

    def close(self) -> None:
        """Close the tables."""
        close_sites(self._sites)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
