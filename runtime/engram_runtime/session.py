"""One sequence: token ids in, logits out, with rows fetched and caches kept."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.activity import Activity, activity_of
from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import (
    Executor,
    OnDevice,
    PendingRows,
    State,
    StepInputs,
    allocate_states,
    empty_rows,
    state_bytes,
)
from engram_runtime.input_embeddings import InputEmbeddings
from engram_runtime.keyers import NO_TOKEN
from engram_runtime.manifest import HIDDEN
from engram_runtime.one_way_states import OneWayStates
from engram_runtime.rows_ahead import RowsAhead
from engram_runtime.sequences import common_length, require_room, require_vocabulary
from engram_runtime.site import Site
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.opening import AUTO_OPTIONS, Announce, choose_stores, open_table, silently
from engram_runtime.tables.options import PREAD, TableOptions
from engram_runtime.tables.overlay import hide_table, read_overlays, with_overlays
from engram_runtime.tables.policy import TableChoice
from engram_runtime.tracing.recorder import Recorder

MOST_PUT_OFF = 3  # tokens that are computed again and again rather than once, for a checkpoint after them
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
    weights = bundle.manifest.entry(decoder.weights).bytes
    return weights + state_bytes(decoder.states, executor.float16_states)


def close_sites(sites: Sequence[Site]) -> None:
    """Close the tables of sites."""
    for site in sites:
        site.table.close()


class Session:
    """The state of one sequence; to be closed."""

    def __init__(self, bundle: Bundle, executor: Executor, sites: Sequence[Site], *, tables_on: bool = True) -> None:
        """Start an empty sequence.

        Args:
            sites: the caller's, who closes them after it. While tokens are added their tables are read by a thread
                too, so by nobody else.
            tables_on: False feeds zero rows. Engram sites then add nothing; Gemma's per-layer inputs are left with the
                projection of the token's embedding, at the scale it has beside rows.
        """
        self.model = bundle.manifest.model
        decoder = bundle.manifest.decoder
        self.state_specs = specs = decoder.states
        self._tells_hidden = HIDDEN in decoder.told_outputs
        self._embeddings = InputEmbeddings(self.model.hidden_size) if decoder.takes_embeddings else None
        self.executor = executor
        self.sites = sites
        self.tables_on = tables_on
        self._rows_ahead = RowsAhead(sites)
        self._counters_before = {site.name: dataclasses.replace(site.table.counters) for site in sites}
        self._states = states = allocate_states(specs, executor.float16_states)
        self._rolls_back = all(spec.rolls_back for spec in specs)
        self._one_way = OneWayStates([states[spec.name] for spec in specs if not spec.rolls_back])
        self._step = executor.bind(states)
        self._token_ids: list[int] = []
        self._changes = 0
        self._held = 0  # how many of them the states hold; those after are computed with the next ones
        self._stale = False  # whether the states may hold other tokens
        self._hidden: list[NDArray[np.float32]] = []  # by the passes of the last call
        self._opened = contextlib.ExitStack()

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
        """Open a bundle's tables and start an empty sequence; they are closed with it, or where it can't start.

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
            session._opened = opened.pop_all()
        return session

    @property
    def tables(self) -> Sequence[TableChoice]:
        """How each table is read that `open` opened to be read."""
        return [site.choice for site in self.sites if site.choice is not None] if self.tables_on else []

    @property
    def states(self) -> Mapping[str, State]:
        """What was computed of `token_ids` alone, by name: the session's own memory, not to be changed."""
        self.catch_up()
        return self._states

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of all tokens so far: a view that grows with the sequence, not to be changed.

        -1 stands for a position that was given as an embedding; see `prefill_embeddings`.
        """
        return self._token_ids

    @property
    def changes(self) -> int:
        """How often tokens were added or trimmed, by which those who use it in turn find out about each other."""
        return self._changes

    @property
    def activity(self) -> Activity:
        """What gated sites did to the tokens of the last forward pass: one, a draft, or a chunk of a longer text.

        Those that were put off and computed with them come first. By site; empty before the first pass, and of a bundle
        whose graph doesn't say it.
        """
        return activity_of(self._step.told)

    @property
    def hidden(self) -> NDArray[np.float32]:
        """The last hidden states ``[T, D]``, after the final norm, of all tokens that were added last in one call.

        For a draft head or another session's `prefill_embeddings`; ``[0, D]`` before the first call, after a
        `trim` of tokens, and of a bundle with neither a head nor input embeddings.
        """
        if len(self._hidden) == 1:
            return self._hidden[0]
        return np.concatenate([np.empty((0, self.model.hidden_size), dtype=np.float32), *self._hidden])

    @property
    def takes_embeddings(self) -> bool:
        """Whether its passes are given embeddings beside token ids; see `prefill_embeddings`."""
        return self._embeddings is not None

    @property
    def room(self) -> int:
        """How many more tokens the context holds."""
        return self.model.context_length - len(self)

    @property
    def put_off(self) -> int:
        """How many of the tokens are computed again with those that come next; see `trim`."""
        self._step_back()
        return len(self) - self._held

    @property
    def counters(self) -> Mapping[str, TableCounters]:
        """What the tables were asked for since the session began, by site; by whoever shares them as well.

        ``wait_s`` is the store's: what passes while the graph runs on the tokens before is part of it.
        """
        return {
            site.name: site.table.counters - self._counters_before[site.name] + self._rows_ahead.early[site.name]
            for site in self.sites
        }

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

    def prefill_embeddings(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add positions that are no tokens, given as input embeddings, and return the logits after the last.

        Table rows belong to tokens: where a position isn't one, sites read zero rows and add nothing of their own, and
        n-grams of the tokens after it begin anew, as at the beginning of a text.

        Args:
            embeddings: ``[T, D]`` float32, in the scale of the model's embedding.

        Returns:
            ``[V]``.

        Raises:
            RequestError: the bundle takes none, they have another shape or are not finite, or there are none or more
                than the context holds.
        """
        if self._embeddings is None:
            raise RequestError("this bundle takes no input embeddings; export it with --embeddings")
        given = np.ascontiguousarray(embeddings, dtype=np.float32)
        if given.ndim != 2 or given.shape[1] != self.model.hidden_size or not np.isfinite(given).all():
            raise RequestError(
                f"input embeddings are {list(given.shape)}, wanted [T, {self.model.hidden_size}] finite numbers"
            )
        require_room(len(given), len(self), self.model.context_length)
        self._embeddings.put(len(self), given)
        self._hidden = []
        *_, last = self._add(np.full(len(given), NO_TOKEN), every_position=False)
        logits: NDArray[np.float32] = last[-1]
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

    def checkpoint(self) -> None:
        """Have a `trim` to this length or a later one step back to here, where it would go back to the beginning.

        The last call counts. Call it before tokens that may be trimmed. Where all states have an entry per position
        there is nothing to do; else the others are copied, unless few of the tokens since the last checkpoint are
        still to be computed again: then that one stays.
        """
        if self.put_off > MOST_PUT_OFF:
            self.catch_up()
        if not self.put_off:
            self._one_way.save(len(self))

    def passes(self, count: int) -> Sequence[int]:
        """Return how many tokens each pass has room for that ``count`` tokens would take, those put off among them."""
        spare = self.model.context_length - self._held - count if self._rolls_back else 0
        return self.executor.chunks(count, spare)

    def catch_up(self) -> None:
        """Compute the tokens that were put off, so that the states hold all tokens."""
        for _ in self._add(np.empty(0, dtype=np.int64), every_position=False):
            pass

    def trim(self, count: int) -> int:
        """Forget the last ``count`` tokens, as if they had never been added; returns how many others it forgot.

        States without an entry per position can't step back. They return to the last `checkpoint` that isn't of
        forgotten tokens, or to the beginning, and the tokens since then are computed again with those that come next.
        """
        if not 0 <= count <= len(self):
            raise RequestError(f"can't trim {count} tokens of a sequence of {len(self)}")
        kept = len(self) - count
        self._stale = self._stale or kept < self._held
        self._token_ids = self._token_ids[:kept]
        if count:
            self._hidden = []
        self._changes += 1
        held = min(self._held, kept)
        self._step_back()
        return held - self._held

    def copy(self, other: "Session", count: int) -> None:
        """Hold the first ``count`` tokens of another session of the same bundle and executor, not to be run meanwhile.

        What both begin with is left as it is; what the other one computed of the rest is copied.

        Raises:
            RequestError: it hasn't computed so many or, where a state doesn't roll back, it has computed more.
        """
        computed = len(other) - other.put_off
        if count > computed or (count < computed and not self._rolls_back):
            raise RequestError(f"can't copy {count} tokens of a sequence that has computed {computed}")
        self.trim(len(self) - common_length(self._token_ids, other.token_ids[:count]))
        self._stale = True  # until it is done: it may be interrupted
        for spec in self.state_specs:
            held = np.s_[..., self._held : count, :] if spec.rolls_back else ...
            self._states[spec.name][held] = other._states[spec.name][held]
        if isinstance(self.executor, OnDevice):
            self.executor.copy_caches(other._states, self._states)
        self._token_ids, self._held, self._stale = other._token_ids[:count], count, False
        self._hidden = []

    def lend(self) -> None:
        """Let a pass over `states` that isn't this session's own add tokens, which `take_back` is then told of.

        Without it that pass has been in vain.
        """
        if self.put_off:
            self.catch_up()
        self._stale = True

    def take_back(self, token_ids: Sequence[int]) -> None:
        """Take note of the tokens that the states hold beside the others since `lend`."""
        self._token_ids += token_ids
        self._held += len(token_ids)
        self._changes += 1
        self._stale = False
        self._hidden = []

    def request(self, token_ids: Sequence[int]) -> None:
        """Say that these tokens may come next, so that their rows are on their way when they do.

        It returns at once, and nothing is to be undone where others come. A draft that grows may be given again whole:
        the rows of each token are fetched once. Rows that can't be read are an error once they are needed. `counters`
        tell how many were fetched early, used and ready.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        require_vocabulary(token_ids, self.model.vocab_size)
        if self.tables_on:
            self._rows_ahead.request(self._history(), [*self._token_ids[self._held :], *token_ids])

    def record(self, recorder: Recorder) -> None:
        """Have all forward passes and look-ups from now on recorded; the sites are nobody else's then."""
        self._step = recorder.step(self._step, self.executor)
        recorder.sites(self.sites, self._rows_ahead.early)

    def _forward(self, token_ids: Sequence[int], *, every_position: bool) -> Iterator[NDArray[np.float32]]:
        ids = self._checked(token_ids)
        self._hidden = []
        yield from self._add(ids, every_position=every_position)

    def _add(self, waiting: NDArray[np.int64], *, every_position: bool) -> Iterator[NDArray[np.float32]]:
        """Compute the tokens that were put off, then these; yields the logits of each pass that has any of these."""
        try:
            while self.put_off or len(waiting):
                missing = np.array(self._token_ids[self._held :], dtype=np.int64)
                chunk, following = self._chunk(np.concatenate([missing, waiting]))
                added = max(0, len(chunk) - len(missing))
                logits = self._pass(chunk, following, every_position=every_position and added > 1)
                self._changes += added > 0
                self._token_ids += waiting[:added].tolist()
                self._held += len(chunk)
                self._stale = False
                waiting = waiting[added:]
                if added:
                    if self._tells_hidden:
                        self._hidden.append(self._step.told[HIDDEN][-added:])
                    yield logits[-added:]
        finally:
            self._rows_ahead.settle()

    def _chunk(self, token_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens of the next pass and those of the one after it, which may be none."""
        size, next_size, *_ = *self.passes(len(token_ids)), 0
        return token_ids[:size], token_ids[size : size + next_size]

    def _pass(
        self, token_ids: NDArray[np.int64], following: NDArray[np.int64], *, every_position: bool
    ) -> NDArray[np.float32]:
        """Run ``token_ids [T]`` after those the states hold, and begin with the rows of those after; returns logits."""
        count = len(token_ids)
        inputs = StepInputs(
            token_ids=token_ids,
            position=self._held,
            logit_rows=np.arange(0 if every_position else count - 1, count, dtype=np.int64),
            rows=self._rows(token_ids, following),
            embeddings=None if self._embeddings is None else self._embeddings.of(self._held, count),
        )
        self._stale = True  # until the books are kept: a step that is interrupted may have changed the states
        return self._step(inputs)

    def _step_back(self) -> None:
        """Make the states hold no other tokens than `token_ids`."""
        if self._stale:
            self._held = self._one_way.step_back(min(self._held, len(self)))
            self._stale = False

    def _rows(self, token_ids: NDArray[np.int64], following: NDArray[np.int64]) -> Mapping[str, PendingRows]:
        if not self.tables_on:
            return {site.name: empty_rows(site.spec, len(token_ids)) for site in self.sites}
        return self._rows_ahead.rows(self._history(), token_ids, following)

    def _history(self) -> Sequence[int]:
        """Return the last tokens that the states hold, as many as rows depend on."""
        return self._token_ids[max(0, self._held - self._rows_ahead.context) : self._held]

    def _checked(self, token_ids: Sequence[int]) -> NDArray[np.int64]:
        require_vocabulary(token_ids, self.model.vocab_size)
        require_room(len(token_ids), len(self), self.model.context_length)
        return np.asarray(token_ids, dtype=np.int64)

    def close(self) -> None:
        """End its thread, and close the tables that `open` opened."""
        self._rows_ahead.close()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
