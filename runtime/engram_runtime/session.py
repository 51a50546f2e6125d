"""One sequence: token ids in, logits out, with rows fetched and caches kept."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor, StepInputs, allocate_states, empty_rows
from engram_runtime.keyers import NO_ROW, Keyer
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables import TableStore, open_table


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
        if found.all():
            return self.table.gather(row_ids.ravel()).reshape(*row_ids.shape, self.spec.record.columns)
        rows = empty_rows(self.spec, len(token_ids))
        rows[found] = self.table.gather(row_ids[found])
        return rows


def open_sites(bundle: Bundle) -> list[Site]:
    """Open every table of a bundle; the caller closes their stores."""
    return [Site(spec, bundle.keyer(spec.keyer), open_table(bundle, spec)) for spec in bundle.manifest.tables]


class Session:
    """The state of one sequence; close it to release its tables."""

    def __init__(self, bundle: Bundle, executor: Executor, sites: Sequence[Site], *, tables_on: bool = True) -> None:
        """Start an empty sequence.

        Args:
            tables_on: False feeds zero rows, so the model runs as if it had no tables.
        """
        self._model = bundle.manifest.model
        self._specs = bundle.manifest.decoder.states
        self._executor = executor
        self._sites = sites
        self._tables_on = tables_on
        self._states = allocate_states(self._specs)
        self._step = executor.bind(self._states)
        self._token_ids: list[int] = []

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of all tokens the states hold: a view that grows with the sequence, not to be changed."""
        return self._token_ids

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
        return np.concatenate(list(self._forward(token_ids, every_position=True)))

    def logits(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Add tokens and yield the logits of every position, ``[chunk, V]`` at a time."""
        return self._forward(token_ids, every_position=True)

    def trim(self, count: int) -> None:
        """Forget the last ``count`` tokens, as if they had never been added.

        States without an entry per position can't step back, so the kept tokens are computed again.
        """
        if not 0 <= count <= len(self):
            raise RequestError(f"can't trim {count} tokens of a sequence of {len(self)}")
        kept = self._token_ids[: len(self) - count]
        if count == 0 or all(spec.rolls_back for spec in self._specs):
            self._token_ids = kept
            return
        self._token_ids = []
        for spec in self._specs:
            if not spec.rolls_back:
                self._states[spec.name][...] = 0
        if kept:
            self.prefill(kept)

    def _forward(self, token_ids: Sequence[int], *, every_position: bool) -> Iterator[NDArray[np.float32]]:
        ids = self._checked(token_ids)
        start = 0
        for size in self._executor.chunks(len(ids)):
            chunk = ids[start : start + size]
            wanted = np.arange(size) if every_position else np.array([size - 1])
            inputs = StepInputs(
                token_ids=chunk, position=len(self), logit_rows=wanted.astype(np.int64), rows=self._rows(chunk)
            )
            logits = self._step(inputs)
            self._token_ids += chunk.tolist()
            start += size
            yield logits

    def _rows(self, token_ids: NDArray[np.int64]) -> Mapping[str, NDArray[np.float32]]:
        if self._tables_on:
            return {site.name: site.rows(self._token_ids, token_ids) for site in self._sites}
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
        for site in self._sites:
            site.table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
