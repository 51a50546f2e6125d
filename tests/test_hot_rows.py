"""Warming: the rows read most often go into the page cache, as many as fit."""

import ctypes
import dataclasses
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.conftest import Command
from tests.small_tables import INT8, as_bytes, table_spec, write_part
from tests.traces import make_trace, trace_site
from tests.workshop import Workshop

from engram_runtime.lens import hot_rows as hot_rows_module
from engram_runtime.lens.addresses import PAGE_BYTES, PartAddresses, part_addresses, touched_pages
from engram_runtime.lens.hot_rows import bring_in, hot_rows
from engram_runtime.lens.recording import record_trace
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.lens.trace_file import write_trace
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.decoding import NumpyRowDecoder, RowDecoder
from engram_runtime.tables.mapped import MappedTable
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.record_files import Locate
from engram_runtime.tables.store import TableStore

ROWS = 200_000  # of 8 bytes: 391 pages


class AskedStore:
    """A store that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []
        self.counters = TableCounters()

    def request(self, row_ids: NDArray[np.int64]) -> None:
        self.asked.append(("request", row_ids.tolist()))

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        assert out.shape == (len(row_ids), INT8.columns)
        self.asked.append(("gather", row_ids.tolist()))

    def close(self) -> None:
        self.asked.append(("close", []))


def pages_in_memory(path: Path) -> NDArray[np.bool_]:
    """Return which pages of a file the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    states = np.zeros(-(-size // PAGE_BYTES), dtype=np.uint8)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        code = libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), states.ctypes.data_as(ctypes.c_void_p))
        assert code == 0, os.strerror(ctypes.get_errno())
    return (states & 1).astype(np.bool_)


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_rows_read_most_often_come_first() -> None:
    trace = make_trace([[7, 500], [7, 501], [3, 501], [3, 502], [3, 502]])
    hot = hot_rows(trace, trace.sites[0], None)
    assert hot.row_ids.tolist() == [3, 7, 501, 502, 500]
    assert hot.served == 1.0


@settings(deadline=None)
@given(
    reads=st.lists(st.tuples(st.integers(0, 499), st.integers(500, 999)), min_size=1, max_size=40),
    pages=st.integers(0, 12),
)
def test_as_many_rows_as_fit_are_taken(reads: list[tuple[int, int]], pages: int) -> None:
    trace = make_trace([list(rows) for rows in reads])
    site = trace.sites[0]
    every, hot = (hot_rows(trace, site, size) for size in (None, pages * PAGE_BYTES))
    assert every.row_ids[: len(hot.row_ids)].tolist() == hot.row_ids.tolist()
    needed = [len(set(touched_pages(site.parts, every.row_ids[:n])[0].tolist())) for n in range(len(every.row_ids) + 1)]
    assert hot.pages == needed[len(hot.row_ids)] <= pages
    assert len(hot.row_ids) == len(every.row_ids) or needed[len(hot.row_ids) + 1] > pages


def test_the_share_of_reads_they_serve_is_told() -> None:
    site = trace_site(first_rows=(0, 500))
    trace = make_trace([[0, 999], [0, 998], [0, 997]], sites=(site,))
    assert hot_rows(trace, site, PAGE_BYTES).served == 0.5


def test_the_next_batch_is_asked_for_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_rows_module, "BATCH_BYTES", 2 * 4 * INT8.columns)
    store = AskedStore()
    bring_in(store, table_spec(INT8, []), np.array([5, 1, 9, 2, 7]))
    assert store.asked == [
        ("request", [2, 9]),
        ("gather", [1, 5]),
        ("request", [7]),
        ("gather", [2, 9]),
        ("request", []),
        ("gather", [7]),
    ]


@pytest.mark.parametrize("open_store", [PreadTable.open, MappedTable])
def test_exactly_the_pages_of_the_rows_are_in_memory_afterwards(
    tmp_path: Path, open_store: Callable[[TableSpec, Locate, RowDecoder], TableStore]
) -> None:
    path = tmp_path / "records.bin"
    part = write_part(path, as_bytes(np.zeros((ROWS, INT8.record_bytes), dtype=np.uint8)))
    spec = table_spec(INT8, [part], ROWS)
    evict(path)
    if pages_in_memory(path).any():
        pytest.skip(f"the file system under {tmp_path} doesn't let go of pages")
    row_ids = np.random.default_rng(0).choice(ROWS, 40, replace=False)
    table = open_store(spec, lambda rows: path, NumpyRowDecoder(INT8, [part.row_bytes]))
    bring_in(table, spec, row_ids)
    table.close()
    expected = set(touched_pages(part_addresses(spec), row_ids)[0].tolist())
    assert set(np.flatnonzero(pages_in_memory(path)).tolist()) == expected


def tiny_trace(workshop: Workshop) -> Trace:
    return record_trace(workshop.uncompiled(), np.arange(40), text="text.txt", command="engram tables trace")


@pytest.mark.parametrize("table_io", ["mmap", "pread"])
def test_the_command_tells_what_it_brought_in(
    workshop: Workshop, tmp_path: Path, command: Command, table_io: str
) -> None:
    trace = tiny_trace(workshop)
    write_trace(tmp_path / "a.trace", trace)
    bundle = workshop.uncompiled().path
    outcome = command(
        "engram", "tables", "warm", bundle, "--from", tmp_path / "a.trace", "--table-io", table_io, "--json"
    )
    (facts,) = outcome.json
    rows = len(np.unique(trace.row_ids["layer_1"]))
    assert facts.pop("seconds") > 0
    assert facts == {
        "site": "layer_1",
        "io": table_io,
        "reason": "as asked for",
        "rows": rows,
        "bytes": 18 * rows,
        "page_cache_bytes": 2 * PAGE_BYTES,
        "served": 1.0,
    }


def test_pages_are_those_of_the_bundle_whatever_the_trace_says(
    workshop: Workshop, tmp_path: Path, command: Command
) -> None:
    trace = tiny_trace(workshop)
    apart = PartAddresses(row_bytes=18, first_rows=(0, 100, 200), addresses=(0, 1 << 20, 1 << 30))
    sites = tuple(dataclasses.replace(site, parts=(apart,)) for site in trace.sites)
    write_trace(tmp_path / "a.trace", dataclasses.replace(trace, sites=sites))
    line = ("engram", "tables", "warm", workshop.uncompiled().path, "--from", tmp_path / "a.trace")
    (facts,) = command(*line, "--table-io", "pread", "--json").json
    assert facts["page_cache_bytes"] == 2 * PAGE_BYTES


def test_there_is_nothing_to_do_for_a_resident_table(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    write_trace(tmp_path / "a.trace", tiny_trace(workshop))
    outcome = command("engram", "tables", "warm", workshop.uncompiled().path, "--from", tmp_path / "a.trace")
    assert outcome.code == 0
    assert outcome.out.startswith("layer_1: nothing to do, the table is held in memory when it is opened: ")


def test_a_trace_of_another_table_is_refused(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    write_trace(tmp_path / "a.trace", make_trace([[0, 500]]))
    outcome = command("engram", "tables", "warm", workshop.uncompiled().path, "--from", tmp_path / "a.trace")
    assert (outcome.code, outcome.err) == (
        3,
        "engram: the trace is of another table layer_1: its number of rows is 1000, the bundle's 326; "
        "record a trace of this bundle\n",
    )


def test_a_trace_of_a_site_the_bundle_lacks_is_refused(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    site: TraceSite = trace_site(site="layer_9")
    write_trace(tmp_path / "a.trace", make_trace([[0, 500]], sites=(site,)))
    bundle = workshop.uncompiled().path
    outcome = command("engram", "tables", "warm", bundle, "--from", tmp_path / "a.trace")
    assert outcome.err == f"engram: the trace has site layer_9, bundle {bundle} has tables of ['layer_1']\n"
