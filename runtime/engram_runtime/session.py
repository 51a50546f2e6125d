"""One sequence: token ids in, logits out, with rows fetched and caches kept."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.activity import Activity, SiteActivity
from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import (
    Executor,
    PendingRows,
    State,
    StepInputs,
    allocate_states,
    empty_rows,
    state_bytes,
)
from engram_runtime.manifest import ACTIVITY, HIDDEN
from engram_runtime.rows_ahead import RowsAhead
from engram_runtime.site import Site
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.opening import AUTO_OPTIONS, Announce, choose_stores, open_table, silently
from engram_runtime.tables.options import PREAD, TableOptions
from engram_runtime.tables.overlay import hide_table, read_overlays, with_overlays
from engram_runtime.tables.policy import TableChoice

UNLOADED = TableOptions(io=PREAD)  # for few rows, or none


def open_sites(
    bundle: Bundle,
    options: TableOptions = AUTO_OPTIONS,
    executor: Executor | None = None,
    *,
    announce: Announce = silently,
) -> list[Site]:
    """Open every table of a bundle that is read, or none where one can't be opened; the caller closes their stores.

    Args:
        executor: what will run beside them, whose compiled decoders are used; or None for nothing.
        announce: told how each is read, and of its loading.

    Raises:
        RequestError: tables are to be resident and don't fit.
        TableError: a file is missing, too short or another one, or an overlay is damaged or for another table.
    """
    overlays = read_overlays(bundle, options.overlays)
    hidden = {site for site, laid in overlays.items() if hide_table(laid)}
    model_bytes = _model_bytes(bundle, executor) if executor else 0
    choices = choose_stores(bundle, options, model_bytes=model_bytes, hidden=hidden)
    with contextlib.ExitStack() as opened:
        sites = []
        for spec, choice in zip(bundle.manifest.tables, choices, strict=True):
            keyer = bundle.keyer(spec.keyer)
            decoder = executor.row_decoder(spec.site) if executor else None
            table = open_table(bundle, spec, choice.io, decoder=decoder, progress=announce(choice))
            opened.callback(table.close)
            sites.append(Site(spec, keyer, with_overlays(table, overlays[spec.site]), choice))
        opened.pop_all()
    return sites


def _model_bytes(bundle: Bundle, executor: Executor) -> int:
    """Return what a sequence takes, and the weights, which are mapped, so that their memory counts as free so far."""
    decoder = bundle.manifest.decoder
    weights = sum(entry.bytes for entry in bundle.manifest.files if entry.path == decoder.weights)
    return weights + state_bytes(decoder.states, executor.float16_states)


def close_sites(sites: Sequence[Site]) -> None:
    """Close the tables of sites."""
    for site in sites:
        site.table.close()


class Session:
    """The state of one sequence; close it to release its tables."""

    def __init__(self, bundle: Bundle, executor: Executor, sites: Sequence[Site], *, tables_on: bool = True) -> None:
        """Start an empty sequence.

        Args:
            sites: closed with it. While tokens are added their tables are read by a thread too, so by nobody else.
            tables_on: False feeds zero rows. Engram sites then add nothing; Gemma's per-layer inputs are left with the
                projection of the token's embedding, at the scale it has beside rows.
        """
        self.model = bundle.manifest.model
        self.state_specs = specs = bundle.manifest.decoder.states
        self._tells_hidden = HIDDEN in bundle.manifest.decoder.told_outputs
        self.executor = executor
        self.sites = sites
        self.tables_on = tables_on
        self._rows_ahead = RowsAhead(sites)
        self._counters_before = {site.name: dataclasses.replace(site.table.counters) for site in sites}
        self._states = states = allocate_states(specs, executor.float16_states)
        self._one_way = [states[spec.name] for spec in specs if not spec.rolls_back]
        self._step = executor.bind(states)
        self._token_ids: list[int] = []
        self._hidden: list[NDArray[np.float32]] = []  # by the passes of the last call
        self._stale = False  # whether states may hold other tokens than `token_ids`

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        executor: Executor,
        *,
        options: TableOptions = AUTO_OPTIONS,
        tables_on: bool = True,
        announce: Announce = silently,
    ) -> Self:
        """Open a bundle's tables and start an empty sequence; the tables are closed where it can't start.

        Args:
            options: how tables are read; with ``tables_on`` False they are opened, neither loaded nor announced.
            announce: see `open_sites`.
        """
        with contextlib.ExitStack() as opened:
            sites = (
                open_sites(bundle, options, executor, announce=announce) if tables_on else open_sites(bundle, UNLOADED)
            )
            opened.callback(close_sites, sites)
            session = cls(bundle, executor, sites, tables_on=tables_on)
            opened.pop_all()
        return session

    @property
    def tables(self) -> Sequence[TableChoice]:
        """How each table is read that `open` opened to be read."""
        return [site.choice for site in self.sites if site.choice is not None] if self.tables_on else []

    @property
    def states(self) -> Mapping[str, State]:
        """What was computed of `token_ids` alone, by name: the session's own memory, not to be changed."""
        self._restore()
        return self._states

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of all tokens the states hold: a view that grows with the sequence, not to be changed."""
        return self._token_ids

    @property
    def activity(self) -> Activity:
        """What gated sites did to the tokens of the last forward pass: one, a draft, or a chunk of a longer text.

        By site; empty before the first pass, and of a bundle whose graph doesn't say it.
        """
        return {
            name.removeprefix(ACTIVITY): SiteActivity(told)
            for name, told in self._step.told.items()
            if name.startswith(ACTIVITY)
        }

    @property
    def hidden(self) -> NDArray[np.float32]:
        """The last hidden states ``[T, D]``, after the final norm, of all tokens that were added last in one call.

        For a draft head; ``[0, D]`` before the first call, and of a bundle without a head.
        """
        return np.concatenate([np.empty((0, self.model.hidden_size), dtype=np.float32), *self._hidden])

    @property
    def room(self) -> int:
        """How many more tokens the context holds."""
        return self.model.context_length - len(self)

    @property
    def counters(self) -> Mapping[str, TableCounters]:
        """What the tables were asked for since the session began, by site; by whoever shares them as well.

        ``wait_s`` is the store's: what passes while the graph runs on the tokens before is part of it.
        """
        return {site.name: site.table.counters - self._counters_before[site.name] for site in self.sites}

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

    def request(self, token_ids: Sequence[int]) -> None:
        """Say that these tokens may come next, so that their rows are on their way when they do.

        It returns at once, and nothing is to be undone where others come. Rows that can't be read are an error once
        they are needed.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        self._check_vocabulary(token_ids)
        if self.tables_on:
            self._rows_ahead.request(self._token_ids, token_ids)

    def _forward(self, token_ids: Sequence[int], *, every_position: bool) -> Iterator[NDArray[np.float32]]:
        ids = self._checked(token_ids)
        self._restore()
        self._hidden = []
        try:
            for chunk, following in self._chunks(ids):
                inputs = self._inputs(self._token_ids, chunk, following, every_position=every_position)
                self._stale = True  # until the books are kept: a step that is interrupted may have changed the states
                logits = self._step(inputs)
                self._token_ids += chunk.tolist()
                self._stale = False
                if self._tells_hidden:
                    self._hidden.append(self._step.told[HIDDEN])
                yield logits
        finally:
            self._rows_ahead.settle()

    def _restore(self) -> int:
        """Make the states hold `token_ids` alone; returns how many tokens were computed again for that."""
        if not self._stale:
            return 0
        for state in self._one_way:
            state[...] = 0
        again = self._token_ids if self._one_way else []
        start = 0
        for chunk, following in self._chunks(np.asarray(again, dtype=np.int64)):
            self._step(self._inputs(again[:start], chunk, following, every_position=False))
            start += len(chunk)
        self._stale = False
        return len(again)

    def _chunks(self, token_ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each chunk and the one after it; the last one is followed by no tokens."""
        start = 0
        for size, next_size in itertools.pairwise([*self.executor.chunks(len(token_ids)), 0]):
            stop = start + size
            yield token_ids[start:stop], token_ids[stop : stop + next_size]
            start = stop

    def _inputs(
        self,
        history: Sequence[int],
        token_ids: NDArray[np.int64],
        following: NDArray[np.int64],
        *,
        every_position: bool,
    ) -> StepInputs:
        """Return the inputs of a pass over ``token_ids [T]`` after ``history``, and begin with the rows after them."""
        count = len(token_ids)
        return StepInputs(
            token_ids=token_ids,
            position=len(history),
            logit_rows=np.arange(0 if every_position else count - 1, count, dtype=np.int64),
            rows=self._rows(history, token_ids, following),
        )

    def _rows(
        self, history: Sequence[int], token_ids: NDArray[np.int64], following: NDArray[np.int64]
    ) -> Mapping[str, PendingRows]:
        if not self.tables_on:
            return {site.name: empty_rows(site.spec, len(token_ids)) for site in self.sites}
        return self._rows_ahead.rows(history, token_ids, following)

    def _checked(self, token_ids: Sequence[int]) -> NDArray[np.int64]:
        self._check_vocabulary(token_ids)
        ids = np.asarray(token_ids, dtype=np.int64)
        if len(ids) == 0:
            raise RequestError("no tokens were given; the model needs at least one")
        if (total := len(self) + len(ids)) > self.model.context_length:
            raise RequestError(f"{total} tokens exceed the context of {self.model.context_length}; shorten the prompt")
        return ids

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.model.vocab_size:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {self.model.vocab_size}")

    def close(self) -> None:
        """Close the tables."""
        self._rows_ahead.close()
        close_sites(self.sites)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
