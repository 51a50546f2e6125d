"""Rows fetched while the graph runs are those fetched when they are needed, whatever happens in between."""

import itertools
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.steps import FunctionStep, filled_rows
from tests.test_manifest import sound_manifest

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError, TableError
from engram_runtime.executor import State, Step, StepInputs
from engram_runtime.keyer_spec import TokenKeyerSpec
from engram_runtime.keyers import NO_ROW
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.records import NO_FACTOR, RecordFormat
from engram_runtime.session import Session
from engram_runtime.site import Site
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.counters import TableCounters

VOCAB, COLUMNS, CHUNK = 50, 3, 4
RECORD = RecordFormat(payload="float32", columns=COLUMNS, scale="none", scale_columns=COLUMNS, factor=NO_FACTOR)


class PairKeyer:
    """Two rows a token: that of the pair with the token before it, and of the token itself; token 0 reads none."""

    columns, context = 2, 1

    def row_ids(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        before = np.array([history[-1] if history else 0, *token_ids[:-1]], dtype=np.int64)
        row_ids = np.stack([VOCAB * before + token_ids, token_ids], axis=1)
        row_ids[token_ids == 0] = NO_ROW
        return row_ids


class WatchedTable:
    """Row r is r times 1, 2, 3.

    Attributes:
        fails_at: how many more gathers work.
        hold: gathers of threads other than the main one wait until it is set, but for the first ``free``.
        gathers, requests: row ids asked for, and by which thread.
        places: addresses that rows were put to.
        at_work: how many gathers run now.
    """

    def __init__(self) -> None:
        self.counters = TableCounters()
        self.fails_at = -1
        self.hold = threading.Event()
        self.hold.set()
        self.free = 0
        self.gathers: list[tuple[list[int], bool]] = []
        self.places: set[int] = set()
        self.requests: list[list[int]] = []
        self.requested = threading.Semaphore(0)
        self.at_work = 0
        self.closed = False

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        assert not self.closed
        ahead = threading.current_thread() is not threading.main_thread()
        self.at_work += 1
        try:
            if ahead and len(self.gathers) >= self.free:
                assert self.hold.wait(10)
            if self.fails_at == 0:
                raise TableError("table file t can't be read at 0: Input/output error")
            self.fails_at -= 1
            self.gathers.append((row_ids.tolist(), ahead))
            self.places.add(out.ctypes.data)
            self.counters.rows += len(row_ids)
            out[...] = row_ids[:, None] * np.arange(1, COLUMNS + 1)
        finally:
            self.at_work -= 1

    def request(self, row_ids: NDArray[np.int64]) -> None:
        assert self.hold.wait(10)
        self.requests.append(row_ids.tolist())
        self.requested.release()

    def close(self) -> None:
        assert self.at_work == 0
        self.closed = True


class RecordingExecutor:
    """Runs `CHUNK` tokens at a time and keeps copies of the rows it is given; the logits are their sum."""

    name, threads, expert_bytes_read, float16_states = "recording", 1, None, ()
    experts_read = None

    def __init__(self) -> None:
        self.rows: list[dict[str, NDArray[np.float32]]] = []

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [CHUNK] * (count // CHUNK) + [1] * (count % CHUNK)

    def row_decoder(self, site: str) -> None:
        return None

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        def step(inputs: StepInputs) -> NDArray[np.float32]:
            filled = {site: filled_rows(rows) for site, rows in inputs.rows.items()}
            self.rows.append(filled)
            total = sum(float(rows.sum()) for rows in filled.values())
            return np.full((len(inputs.logit_rows), 1), total, dtype=np.float32)

        return FunctionStep(step)


def site(name: str, table: WatchedTable) -> Site:
    rows = VOCAB * VOCAB
    ranges = (RowRange(first_row=0, num_rows=rows, file="t", external=False, offset=0),)
    spec = TableSpec(
        site=name,
        num_rows=rows,
        record=RECORD,
        parts=(TablePart(row_bytes=RECORD.record_bytes, ranges=ranges),),
        keyer=TokenKeyerSpec(vocab_size=VOCAB, pad_id=0),
    )
    return Site(spec, PairKeyer(), table)


def new_session(*tables: WatchedTable) -> tuple[Session, RecordingExecutor]:
    raw = sound_manifest()
    raw["graphs"]["decoder"]["states"] = []
    executor = RecordingExecutor()
    sites = [site(f"site {index}", table) for index, table in enumerate(tables)]
    return Session(Bundle(Path(), Manifest.from_dict(raw)), executor, sites), executor


@pytest.fixture
def table() -> Iterator[WatchedTable]:
    table = WatchedTable()
    yield table
    table.hold.set()


def true_rows(history: Sequence[int], token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Return ``[T, 2, COLUMNS]`` rows, worked out token by token."""
    rows = np.zeros((len(token_ids), 2, COLUMNS), dtype=np.float32)
    for place, (before, token_id) in enumerate(itertools.pairwise([*(history[-1:] or [0]), *token_ids])):
        if token_id:
            rows[place] = np.outer([VOCAB * before + token_id, token_id], [1, 2, 3])
    return rows


def threads_of_rows() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engram-rows")]


TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10)


@settings(deadline=None)
@given(texts=st.lists(TOKENS, min_size=1, max_size=3))
def test_every_pass_gets_the_rows_of_its_tokens(texts: list[list[int]]) -> None:
    session, executor = new_session(WatchedTable(), WatchedTable())
    with session:
        for text in texts:
            session.prefill(text)
    whole = [token_id for text in texts for token_id in text]
    for name in ("site 0", "site 1"):
        found = np.concatenate([rows[name] for rows in executor.rows])
        np.testing.assert_array_equal(found, true_rows([], whole), strict=True)


def test_rows_of_the_next_chunk_are_fetched_by_another_thread(table: WatchedTable) -> None:
    session, _ = new_session(table)
    with session:
        session.prefill(list(range(1, 10)))
    assert [ahead for _, ahead in table.gathers] == [True, True, True]


def test_the_graph_runs_while_rows_are_on_their_way(table: WatchedTable) -> None:
    session, executor = new_session(table)
    table.hold.clear()
    table.free = 1
    with session:
        logits = session.logits(list(range(1, 9)))
        next(logits)
        assert (len(executor.rows), len(table.gathers)) == (1, 1)
        table.hold.set()
        next(logits)
    assert len(executor.rows) == 2


def test_the_graph_begins_before_the_rows_of_its_tokens_are_there(table: WatchedTable) -> None:
    begun = threading.Event()
    table.hold.clear()

    class Beginning(RecordingExecutor):
        def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
            def step(inputs: StepInputs) -> NDArray[np.float32]:
                assert table.gathers == []
                begun.set()
                table.hold.set()
                return np.full((1, 1), filled_rows(inputs.rows["site 0"]).sum(), dtype=np.float32)

            return FunctionStep(step)

    raw = sound_manifest()
    raw["graphs"]["decoder"]["states"] = []
    with Session(Bundle(Path(), Manifest.from_dict(raw)), Beginning(), [site("site 0", table)]) as session:
        assert session.prefill([5]) == true_rows([], [5]).sum()
    assert begun.is_set()


def test_without_tables_there_is_no_thread() -> None:
    session, executor = new_session()
    with session:
        session.prefill(list(range(1, 10)))
        session.request([1])
        assert threads_of_rows() == []
    assert executor.rows == [{}, {}, {}]


def test_buffers_are_used_again(table: WatchedTable) -> None:
    session, _ = new_session(table)
    with session:
        session.prefill(list(range(1, 5 * CHUNK + 1)))
    assert len(table.gathers) == 5
    assert len(table.places) == 2


def test_an_error_of_the_thread_comes_where_its_rows_are_needed(table: WatchedTable) -> None:
    session, executor = new_session(table)
    table.fails_at = 2
    with session:
        with pytest.raises(TableError) as caught:
            session.prefill(list(range(1, 14)))
        assert str(caught.value) == "table file t can't be read at 0: Input/output error"
        assert session.token_ids == list(range(1, 9))
        table.fails_at = -1
        session.prefill([9, 10])
    np.testing.assert_array_equal(executor.rows[-1]["site 0"], true_rows([9], [10]), strict=True)
    assert len(executor.rows) == 4


def test_trimming_between_two_chunks_leaves_the_rows_of_what_is_kept(table: WatchedTable) -> None:
    session, executor = new_session(table)
    with session:
        logits = session.logits([1, 2, 3, 4, 5, 6, 7, 8])
        next(logits)
        session.trim(2)
        next(logits)
        assert session.token_ids == [1, 2, 5, 6, 7, 8]
    np.testing.assert_array_equal(executor.rows[-1]["site 0"], true_rows([2], [5, 6, 7, 8]), strict=True)


def test_other_tokens_between_two_chunks_get_rows_of_their_own(table: WatchedTable) -> None:
    session, executor = new_session(table)
    with session:
        logits = session.logits([1, 2, 3, 4, 5, 6, 7, 8])
        next(logits)
        session.prefill([11, 12, 13, 14, 15, 16, 17, 18])
        next(logits)
    given_rows = np.concatenate([rows["site 0"] for rows in executor.rows])
    expected = true_rows([], [1, 2, 3, 4, 11, 12, 13, 14, 15, 16, 17, 18, 5, 6, 7, 8])
    np.testing.assert_array_equal(given_rows, expected, strict=True)


def test_no_thread_works_for_a_generator_that_is_closed(table: WatchedTable) -> None:
    session, _ = new_session(table)
    with session:
        logits = session.logits(list(range(1, 14)))
        table.hold.clear()
        table.free = 1
        next(logits)
        threading.Timer(0.05, table.hold.set).start()
        logits.close()  # type: ignore[attr-defined]
        assert table.at_work == 0
        assert len(table.gathers) == 2


def test_closing_a_session_ends_its_thread_and_leaves_the_tables_to_their_owner(table: WatchedTable) -> None:
    session, _ = new_session(table)
    logits = session.logits(list(range(1, 14)))
    next(logits)
    session.close()
    assert (table.closed, threads_of_rows()) == (False, [])
    session.close()


def test_sessions_side_by_side_keep_their_rows_apart() -> None:
    sessions = [new_session(WatchedTable()) for _ in range(3)]
    texts = [list(range(1 + shift, 14 + shift)) for shift in range(3)]
    streams = [session.logits(text) for (session, _), text in zip(sessions, texts, strict=True)]
    for _ in zip(*streams, strict=True):
        pass
    for (session, executor), text in zip(sessions, texts, strict=True):
        session.close()
        found = np.concatenate([rows["site 0"] for rows in executor.rows])
        np.testing.assert_array_equal(found, true_rows([], text), strict=True)


def test_a_forked_child_fetches_rows_ahead_too(table: WatchedTable) -> None:
    session, executor = new_session(table)
    with session:
        session.prefill(list(range(1, 10)))
        if (child := os.fork()) == 0:
            session.prefill(list(range(10, 20)))
            found = np.concatenate([rows["site 0"] for rows in executor.rows])
            os._exit(0 if np.array_equal(found, true_rows([], list(range(1, 20)))) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_the_rows_of_a_draft_are_fetched_and_nothing_waits_for_them(table: WatchedTable) -> None:
    session, executor = new_session(table)
    with session:
        session.prefill([1, 2, 3, 4])
        table.gathers.clear()
        table.hold.clear()
        session.request([5, 0, 5])
        assert table.gathers == []
        table.hold.set()
        session.decode([5, 0, 5])
    # Of 5 after 4, of 0 none, of 5 after 0.
    assert table.gathers == [([4 * VOCAB + 5, 5, 5, 5], True)]
    given_rows = np.concatenate([rows["site 0"] for rows in executor.rows[1:]])
    np.testing.assert_array_equal(given_rows, true_rows([4], [5, 0, 5]), strict=True)


def test_rows_of_a_draft_that_grows_are_fetched_once(table: WatchedTable) -> None:
    session, _ = new_session(table)
    with session:
        session.prefill([1, 2, 3])
        table.gathers.clear()
        for length in range(1, 5):
            session.request([4, 5, 6, 7][:length])
        session.decode([4, 5, 6, 7])
    assert [row_ids for row_ids, _ in table.gathers] == [
        [3 * VOCAB + 4, 4],
        [4 * VOCAB + 5, 5],
        [5 * VOCAB + 6, 6],
        [6 * VOCAB + 7, 7],
    ]


SHORT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)
DRAFTS = st.lists(st.tuples(SHORT, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=3)


@settings(deadline=None)
@given(drafts=DRAFTS, others=SHORT)
def test_whatever_was_requested_every_pass_gets_the_rows_of_its_tokens(
    drafts: list[tuple[list[int], int, int]], others: list[int]
) -> None:
    session, executor = new_session(WatchedTable(), WatchedTable())
    whole: list[int] = []
    with session:
        for tokens, told, right in drafts:
            session.request(tokens[:told])
            session.request(tokens)
            came = [*tokens[:right], *others]
            session.prefill(came)
            whole += came
    for name in ("site 0", "site 1"):
        found = np.concatenate([rows[name] for rows in executor.rows])
        np.testing.assert_array_equal(found, true_rows([], whole), strict=True)


def test_counters_tell_which_rows_of_drafts_were_used_and_ready(table: WatchedTable) -> None:
    session, _ = new_session(table)
    with session:
        session.request([1, 2, 3])
        session.request([1, 2, 3, 0, 3])
        while len(table.gathers) < 2:
            time.sleep(0.001)
        session.prefill([1, 2])
        first = session.counters["site 0"]
        table.hold.clear()
        session.request([3, 4])
        threading.Timer(0.05, table.hold.set).start()
        session.prefill([3])
        both = session.counters["site 0"]
    # The rows of 1, 2 and 3, which are those of the pairs (0, 1) and (0, 3) as well, and of pairs (1, 2) and (2, 3).
    assert (first.early, first.early_used, first.early_ready) == (5, 3, 3)
    # Then pairs (2, 3) and (3, 4) and the rows of 3 and 4, of which the pass waited for those of 3.
    assert (both - first) == TableCounters(rows=both.rows - first.rows, early=4, early_used=2, early_ready=0)


def test_a_draft_that_can_not_be_read_is_no_error_where_others_come(table: WatchedTable) -> None:
    session, executor = new_session(table)
    with session:
        session.prefill([1])
        table.fails_at = 0
        session.request([2])
        with pytest.raises(TableError):
            session.prefill([2])
        table.fails_at = -1
        session.prefill([3])
    np.testing.assert_array_equal(executor.rows[-1]["site 0"], true_rows([1], [3]), strict=True)
    assert session.counters["site 0"].early == 0


def test_a_draft_of_an_unknown_token_is_refused(table: WatchedTable) -> None:
    session, _ = new_session(table)
    with session, pytest.raises(RequestError) as caught:
        session.request([1, 10_000])
    assert str(caught.value).startswith("token id 10000 is outside the vocabulary of ")


def test_with_tables_off_nothing_is_requested(table: WatchedTable) -> None:
    raw = sound_manifest()
    raw["graphs"]["decoder"]["states"] = []
    sites = [site("site 0", table)]
    with Session(Bundle(Path(), Manifest.from_dict(raw)), RecordingExecutor(), sites, tables_on=False) as session:
        session.prefill(list(range(1, 10)))
        session.request([1])
    assert (table.gathers, table.requests) == ([], [])


def test_rows_of_further_sites_are_requested_before_the_first_ones_are_waited_for() -> None:
    tables = [WatchedTable(), WatchedTable()]
    session, _ = new_session(*tables)
    with session:
        session.prefill([7])
    assert [table.requests for table in tables] == [[], [[7]]]


def test_a_session_counts_what_it_asked_for_since_it_began(table: WatchedTable) -> None:
    table.counters.rows = 100
    session, _ = new_session(table)
    with session:
        session.prefill([1, 0, 2])
        assert session.counters == {"site 0": TableCounters(rows=4)}
        session.decode([3])
        assert session.counters == {"site 0": TableCounters(rows=6)}
    assert table.counters.rows == 106
