"""Stores of tables: resident, mapped and read rows are the same bits, and damage is an error the process survives."""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.rows import gathered
from tests.small_tables import (
    COLUMNS,
    FORMATS,
    INT8,
    ROWS,
    RecordedReads,
    as_bytes,
    as_ids,
    joined_spec,
    open_descriptors,
    records,
    row_format,
    row_range,
    sharded_spec,
    split_spec,
    table_spec,
    true_values,
    write_part,
)

from engram_runtime.errors import TableError
from engram_runtime.records import RecordFormat
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.advice import POPULATE_READ, WILL_NEED, MemoryAdvice
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.decoding import SHARED_FROM_ROWS, NumpyRowDecoder, RowDecoder
from engram_runtime.tables.mapped import MappedTable
from engram_runtime.tables.memory import ResidentTable
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.record_file import can_lease
from engram_runtime.tables.record_files import Locate
from engram_runtime.tables.regions import allocate_huge, reserve
from engram_runtime.tables.residency import BLOCK_ROWS, PAGE, PRESENT, REQUESTED, UNKNOWN, Residency
from engram_runtime.tables.row_ids import count_distinct, distinct
from engram_runtime.tables.store import TableStore

ENCODED = [("float8_e4m3", "e8m0", 32), ("float8_e4m3", "float32", 64), ("int4", "float16", 16), ("int8", "e8m0", 8)]
PAYLOADS = ["float32", "float16", "bfloat16", "float8_e4m3", "int8", "int4"]


class Open(Protocol):
    """What opens a store."""

    def __call__(self, spec: TableSpec, locate: Locate, decoder: RowDecoder, /) -> TableStore: ...


OPEN: list[Open] = [ResidentTable.load, MappedTable, PreadTable.open]
ON_DISK: list[Open] = [MappedTable, PreadTable.open]
LAYOUTS: list[Callable[[Path], TableSpec]] = [joined_spec, split_spec, sharded_spec]


def decoder(spec: TableSpec) -> NumpyRowDecoder:
    return NumpyRowDecoder(spec.record, [part.row_bytes for part in spec.parts])


def opened(open_store: Open, folder: Path, spec: TableSpec) -> TableStore:
    return open_store(spec, lambda rows: folder / rows.file, decoder(spec))


def random_records(rows: int, num_bytes: int) -> NDArray[np.uint8]:
    """Return ``[rows, num_bytes]`` with no NaN of float8 and no large exponent in them."""
    return np.random.default_rng(3).integers(0, 256, (rows, num_bytes), dtype=np.uint8) & np.uint8(0x77)


def wide_spec(folder: Path, rows: int, columns: int = 3 * PAGE, record: RecordFormat | None = None) -> TableSpec:
    """Rows of int8 over several pages each, or records of a format."""
    record = record or row_format("int8", "none", columns=columns)
    return table_spec(record, [write_part(folder / "wide.bin", random_records(rows, record.record_bytes))], rows)


def wide_values(folder: Path, spec: TableSpec) -> NDArray[np.float32]:
    data = np.fromfile(folder / "wide.bin", dtype=np.uint8)[100:]
    return spec.record.decode(data.reshape(spec.num_rows, -1))


class RecordedAdvice:
    """Advises as the kernel does and keeps what it was told; at ``fails`` it does nothing and says so."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []  # advice and how many ranges
        self.fails: int | None = None
        self.before: Callable[[], None] = lambda: None
        self._advise = MemoryAdvice()

    def __call__(self, ranges: NDArray[np.int64], advice: int) -> int:
        self.told.append((advice, len(ranges)))
        if advice == self.fails:
            return 0
        self.before()
        return self._advise(ranges, advice)

    def close(self) -> None:
        self._advise.close()


class FailingReads:
    """Fails with an I/O error as long as it is told to."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset, flags)


def mapped(folder: Path, spec: TableSpec, advice: RecordedAdvice, read: FailingReads | None = None) -> MappedTable:
    return MappedTable(
        spec, lambda rows: folder / rows.file, decoder(spec), read=read or os.preadv, open_advice=lambda: advice
    )


def maps_of(path: Path) -> list[tuple[int, int]]:
    """Return where in this process a file is mapped."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [tuple(int(each, 16) for each in line.split()[0].split("-")) for line in lines]  # type: ignore[misc]


def evict(path: Path) -> None:
    """Take a file out of memory, also where it is mapped."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for begin, end in maps_of(path):
            assert (
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED) == 0
            )
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_resident_mapped_and_read_rows_of_every_format_equal_plain_numpy(tmp_path: Path) -> None:
    for payload, scale in FORMATS:
        record = row_format(payload, scale)
        spec = joined_spec(tmp_path, record)
        for open_store in OPEN:
            table = opened(open_store, tmp_path, spec)
            np.testing.assert_array_equal(gathered(table, COLUMNS, np.arange(ROWS)), true_values(record), strict=True)
            table.close()


@pytest.mark.parametrize("open_store", OPEN)
@pytest.mark.parametrize(("payload", "scale", "scale_columns"), ENCODED)
def test_rows_are_the_bits_of_their_records_decoded_one_by_one(
    tmp_path: Path, open_store: Open, payload: str, scale: str, scale_columns: int
) -> None:
    record = row_format(payload, scale, columns=64, scale_columns=scale_columns)
    spec = wide_spec(tmp_path, 2000, record=record)
    row_ids = np.random.default_rng(1).integers(0, 2000, 3000)
    table = opened(open_store, tmp_path, spec)
    found = gathered(table, 64, row_ids)
    table.close()
    np.testing.assert_array_equal(found.view(np.uint32), wide_values(tmp_path, spec)[row_ids].view(np.uint32))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("columns", [1, 2, 6, 7])
def test_a_payload_is_decoded_wherever_it_lies(payload: str, columns: int) -> None:
    columns += columns % 2 if payload == "int4" else 0
    record = row_format(payload, "none", columns=columns)
    memory = random_records(1, 999)[0]
    offsets = np.random.default_rng(2).integers(0, 999 - record.record_bytes, (1, 70))
    out = np.empty((70, columns), dtype=np.float32)
    NumpyRowDecoder(record, [record.record_bytes])(memory, offsets, out)
    copies = np.stack([memory[offset : offset + record.record_bytes] for offset in offsets[0]])
    np.testing.assert_array_equal(out, record.decode(copies), strict=True)


@pytest.mark.parametrize("open_store", OPEN)
@settings(max_examples=60, deadline=None)
@given(
    starts=st.sets(st.integers(1, ROWS - 1), max_size=8),
    batches=st.lists(st.lists(st.integers(0, ROWS - 1), max_size=20), max_size=4),
)
def test_rows_are_the_same_however_the_files_are_cut(
    tmp_path_factory: pytest.TempPathFactory, open_store: Open, starts: set[int], batches: list[list[int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    table = opened(open_store, folder, sharded_spec(folder, starts=(0, *sorted(starts))))
    for row_ids in batches:
        np.testing.assert_array_equal(
            gathered(table, COLUMNS, as_ids(row_ids)), true_values(INT8)[row_ids], strict=True
        )
    table.close()


@pytest.mark.parametrize("open_store", OPEN)
@pytest.mark.parametrize("columns", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 5, 5 * PAGE])
def test_rows_over_several_pages_equal_numpy(tmp_path: Path, open_store: Open, columns: int) -> None:
    spec = wide_spec(tmp_path, 9, columns)
    table = opened(open_store, tmp_path, spec)
    for row_ids in ([4], [2, 0], [8, 1, 8], [3, 2, 1]):
        np.testing.assert_array_equal(
            gathered(table, columns, as_ids(row_ids)), wide_values(tmp_path, spec)[row_ids], strict=True
        )
    table.close()


@pytest.mark.parametrize("open_store", OPEN)
def test_batches_of_many_blocks_equal_numpy(tmp_path: Path, open_store: Open) -> None:
    record = row_format("int8", "float16", columns=160)
    spec = wide_spec(tmp_path, 3000, record=record)
    row_ids = np.random.default_rng(1).integers(0, 3000, 2 * BLOCK_ROWS + 17 + (8 << 20) // record.record_bytes)
    table = opened(open_store, tmp_path, spec)
    found = gathered(table, 160, row_ids)
    table.close()
    np.testing.assert_array_equal(found, wide_values(tmp_path, spec)[row_ids], strict=True)
    assert (table.counters.rows, table.counters.unique) == (len(row_ids), len(np.unique(row_ids)))


@pytest.mark.parametrize("open_store", OPEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_row_ids_are_no_rows(tmp_path: Path, open_store: Open, layout: Callable[[Path], TableSpec]) -> None:
    table = opened(open_store, tmp_path, layout(tmp_path))
    table.request(as_ids([]))
    assert gathered(table, COLUMNS, as_ids([])).shape == (0, COLUMNS)
    assert table.counters == TableCounters()
    table.close()


@pytest.mark.parametrize("outside", [-1, -(2**63), ROWS, 2**63 - 1])
@pytest.mark.parametrize("open_store", OPEN)
def test_a_row_id_outside_the_table_is_named(tmp_path: Path, open_store: Open, outside: int) -> None:
    table = opened(open_store, tmp_path, joined_spec(tmp_path))
    for ask in (lambda ids: gathered(table, COLUMNS, ids), table.request):
        with pytest.raises(IndexError) as caught:
            ask(as_ids([0, outside, ROWS - 1]))
        assert str(caught.value) == f"row id {outside} is outside [0, 40)"
    assert table.counters == TableCounters()
    table.close()


@pytest.mark.parametrize("open_store", OPEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_closed_table_holds_no_file_and_no_map(
    tmp_path: Path, open_store: Open, layout: Callable[[Path], TableSpec]
) -> None:
    spec = layout(tmp_path)
    before = open_descriptors()
    table = opened(open_store, tmp_path, spec)
    gathered(table, COLUMNS, as_ids([1, 39]))
    table.close()
    table.close()
    assert open_descriptors() == before
    assert [maps_of(path) for path in tmp_path.iterdir()] == [[]] * len(list(tmp_path.iterdir()))


def test_a_closed_table_gives_no_rows(tmp_path: Path) -> None:
    errors = []
    for open_store in OPEN:
        table = opened(open_store, tmp_path, joined_spec(tmp_path))
        table.close()
        with pytest.raises((OSError, ValueError)) as caught:
            gathered(table, COLUMNS, as_ids([1]))
        errors.append(str(caught.value))
    assert errors == ["the table is closed", "[Errno 9] Bad file descriptor", "[Errno 9] Bad file descriptor"]


@pytest.mark.parametrize("open_store", OPEN)
def test_no_file_stays_open_if_a_later_one_is_too_short(tmp_path: Path, open_store: Open) -> None:
    spec = split_spec(tmp_path)
    os.truncate(tmp_path / "scales.bin", 101)
    before = open_descriptors()
    with pytest.raises(TableError) as caught:
        opened(open_store, tmp_path, spec)
    assert (
        str(caught.value) == f"table file {tmp_path / 'scales.bin'} holds 101 bytes, its rows need 180; export it again"
    )
    assert open_descriptors() == before


def test_a_folder_in_place_of_a_file_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    part = TablePart(row_bytes=1, ranges=(row_range("folder", 0, 2, offset=0),))
    before = open_descriptors()
    with pytest.raises(TableError) as caught:
        opened(MappedTable, tmp_path, table_spec(row_format("int8", "none", columns=1), [part], rows=2))
    assert str(caught.value) == f"table file {tmp_path / 'folder'} can't be mapped: No such device; use pread"
    assert open_descriptors() == before


def test_loading_tells_of_every_byte(tmp_path: Path) -> None:
    told: list[int] = []
    record = row_format("int8", "none", columns=6000)
    spec = wide_spec(tmp_path, 3000, record=record)
    ResidentTable.load(spec, lambda rows: tmp_path / rows.file, decoder(spec), progress=told.append)
    assert (len(told), sum(told)) == (3, 3000 * 6000)


def test_resident_tables_are_given_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages")
    plain, huge = np.frombuffer(reserve(8 << 20), dtype=np.uint8), allocate_huge(8 << 20)
    assert ["hg" in vm_flags(memory) for memory in (plain, huge)] == [False, True]


def vm_flags(memory: NDArray[np.uint8]) -> list[str]:
    """Return the flags of the range of addresses that memory begins in, see proc_pid_smaps(5)."""
    smaps = Path("/proc/self/smaps").read_text()
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", smaps, flags=re.MULTILINE | re.DOTALL)
    return next(flags.split() for begin, end, flags in ranges if int(begin, 16) <= memory.ctypes.data < int(end, 16))


def test_addresses_that_are_not_granted_are_an_error_with_advice() -> None:
    with pytest.raises(TableError) as caught:
        reserve(1 << 60)
    assert str(caught.value) == (
        "1048576.0 TiB of addresses for a table are refused: Cannot allocate memory; "
        "free memory or raise this process' limit (ulimit -v)"
    )


def test_a_table_is_not_loaded_before_its_files_were_found_long_enough(tmp_path: Path) -> None:
    write_part(tmp_path / "rows.bin", records(INT8))
    part = TablePart(row_bytes=INT8.record_bytes, ranges=(row_range("rows.bin", 0, 1 << 50),))
    with pytest.raises(TableError) as caught:
        opened(ResidentTable.load, tmp_path, table_spec(INT8, [part], rows=1 << 50))
    assert str(caught.value) == (
        f"table file {tmp_path / 'rows.bin'} holds 420 bytes, its rows need {8 * 2**50 + 100}; export it again"
    )


def test_counters_are_sums_over_batches_of_what_was_distinct_in_each(tmp_path: Path) -> None:
    spec = joined_spec(tmp_path)
    for open_store in OPEN:
        table = opened(open_store, tmp_path, spec)
        gathered(table, COLUMNS, as_ids([5, 5, 7]))
        gathered(table, COLUMNS, as_ids([7, 7]))
        counters = table.counters
        assert (counters.rows, counters.unique, counters.bytes) == (5, 3, 3 * INT8.record_bytes)
        table.close()


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 3000), max_size=40), repeats=st.integers(1, 200), spread=st.integers(1, 2**50))
def test_distinct_values_are_counted_as_a_set_counts_them(values: list[int], repeats: int, spread: int) -> None:
    repeated = as_ids([spread * value for value in values] * repeats)
    assert count_distinct(repeated) == len(set(values))


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 30), max_size=40))
def test_distinct_values_and_their_places_are_those_of_numpy(values: list[int]) -> None:
    found, places = distinct(as_ids(values))
    expected, inverse = np.unique(as_ids(values), return_inverse=True)
    np.testing.assert_array_equal(found, expected, strict=True)
    np.testing.assert_array_equal(places, inverse, strict=True)


def test_rows_read_a_moment_ago_are_cold_only_if_they_would_have_to_be_waited_for(tmp_path: Path) -> None:
    spec, read = split_spec(tmp_path), RecordedReads()
    nothing_cached, all_cached = (
        PreadTable.open(spec, lambda rows: tmp_path / rows.file, decoder(spec), read=each) for each in (read, os.preadv)
    )
    cold = []
    for table in (nothing_cached, all_cached):
        for _ in range(2):
            gathered(table, COLUMNS, as_ids([5, 5, 7]))
            cold.append(table.counters.cold)
        table.close()
    assert cold == [2, 4, 2, 2]
    assert nothing_cached.counters.wait_s > 0


def test_a_file_system_that_cannot_tell_what_is_in_memory_is_read_all_the_same(tmp_path: Path) -> None:
    def unable(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.preadv(descriptor, buffers, offset)

    spec = sharded_spec(tmp_path)
    table = PreadTable.open(spec, lambda rows: tmp_path / rows.file, decoder(spec), read=unable)
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([9, 1])), true_values(INT8)[[9, 1]], strict=True)
    table.close()


def test_mapped_rows_are_asked_for_once_and_cold_once(tmp_path: Path) -> None:
    advice = RecordedAdvice()
    table = mapped(tmp_path, wide_spec(tmp_path, 40, PAGE), advice)
    gathered(table, PAGE, as_ids([9, 3, 3]))
    assert advice.told == [(WILL_NEED, 3), (POPULATE_READ, 3)]  # duplicates cost less than a sort
    gathered(table, PAGE, as_ids([3, 9]))
    assert len(advice.told) == 2
    assert (table.counters.rows, table.counters.unique, table.counters.cold) == (5, 4, 2)
    table.close()


def test_requested_rows_are_asked_for_once_and_waited_for_when_they_are_gathered(tmp_path: Path) -> None:
    advice = RecordedAdvice()
    table = mapped(tmp_path, wide_spec(tmp_path, 40, PAGE), advice)
    table.request(as_ids([9, 20]))
    table.request(as_ids([20, 9]))
    assert advice.told == [(WILL_NEED, 2)]
    gathered(table, PAGE, as_ids([9, 30]))
    assert advice.told[1:] == [(WILL_NEED, 2), (POPULATE_READ, 2)]
    assert table.counters.cold == 2
    table.close()


@settings(deadline=None)
@given(
    firsts=st.lists(st.integers(0, 20 * PAGE), min_size=1, max_size=10),
    sizes=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=3),
)
def test_ranges_are_the_pages_of_each_part_of_a_record(firsts: list[int], sizes: list[int]) -> None:
    addresses = np.tile(as_ids(firsts), (len(sizes), 1))
    wanted = [(first // PAGE * PAGE, first + size) for size in sizes for first in sorted(firsts)]
    ranges = Residency(30 * PAGE, sizes).ranges(addresses, 7 * PAGE).tolist()
    assert ranges == [[7 * PAGE + begin, end - begin] for begin, end in wanted]


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5 * PAGE), shift=st.integers(0, PAGE), known=st.sets(st.integers(0, 9), max_size=10))
def test_a_row_is_known_if_and_only_if_all_its_pages_are(size: int, shift: int, known: set[int]) -> None:
    residency = Residency(12 * size + 2 * PAGE, [size])
    rows = shift + size * np.arange(10)[None]
    residency.mark(residency.pages(rows[:, sorted(known)]), PRESENT)
    states = residency.states(residency.pages(rows)).min(axis=0)
    pages = [set(range(int(row) // PAGE, (int(row) + size - 1) // PAGE + 1)) for row in rows[0]]
    present = {page for row in known for page in pages[row]}
    assert [state == PRESENT for state in states] == [each <= present for each in pages]


def test_what_was_forgotten_is_unknown() -> None:
    residency = Residency(5000 * PAGE, [10])
    pages = np.array([[1, 4999]])
    residency.mark(pages, REQUESTED)
    assert residency.states(pages).tolist() == [[REQUESTED, REQUESTED]]
    residency.forget()
    assert residency.states(pages).tolist() == [[UNKNOWN, UNKNOWN]]


@pytest.mark.parametrize(("most_age_s", "cold"), [(3600.0, 1), (0.0, 2)])
def test_what_is_known_is_forgotten_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_age_s: float, cold: int
) -> None:
    monkeypatch.setattr("engram_runtime.tables.residency.MOST_AGE_S", most_age_s)
    table = opened(MappedTable, tmp_path, joined_spec(tmp_path))
    for _ in range(2):
        gathered(table, COLUMNS, as_ids([3]))
    assert table.counters.cold == cold
    table.close()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 3000])
def test_as_many_ranges_as_there_are_take_advice(monkeypatch: pytest.MonkeyPatch, batched: bool, count: int) -> None:
    advise = memory_advice(monkeypatch, batched)
    memory = np.frombuffer(mmap.mmap(-1, 3000 * PAGE), dtype=np.uint8)
    ranges = np.array([[memory.ctypes.data + PAGE * page, PAGE] for page in range(count)], dtype=np.int64)
    assert advise(ranges.reshape(-1, 2), POPULATE_READ) == count
    advise.close()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 1023, 1024, 1999])
def test_the_range_that_takes_no_advice_is_told(monkeypatch: pytest.MonkeyPatch, batched: bool, bad: int) -> None:
    advise = memory_advice(monkeypatch, batched)
    memory = np.frombuffer(mmap.mmap(-1, 2000 * PAGE), dtype=np.uint8)
    ranges = np.array([(memory.ctypes.data + PAGE * page, PAGE) for page in range(2000)], dtype=np.int64)
    ranges[bad, 0] += 1  # not the beginning of a page
    assert advise(ranges, POPULATE_READ) == bad
    advise.close()
    advise.close()


def test_a_forked_child_advises_its_own_memory() -> None:
    advise = MemoryAdvice()
    memory = np.frombuffer(mmap.mmap(-1, 3 * PAGE), dtype=np.uint8)
    ranges = np.array([(memory.ctypes.data + PAGE * page, PAGE) for page in range(3)], dtype=np.int64)
    if (child := os.fork()) == 0:
        os._exit(advise(ranges, POPULATE_READ))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == advise(ranges, POPULATE_READ) == 3
    advise.close()


def memory_advice(monkeypatch: pytest.MonkeyPatch, batched: bool) -> MemoryAdvice:
    def refuse(process: int) -> int:
        raise PermissionError(errno.EPERM, "a sandbox")

    with monkeypatch.context() as patched:
        if not batched:
            patched.setattr(os, "pidfd_open", refuse)
        return MemoryAdvice()


def test_without_batches_mapped_rows_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = sharded_spec(tmp_path)
    advise = memory_advice(monkeypatch, batched=False)
    table = MappedTable(spec, lambda rows: tmp_path / rows.file, decoder(spec), open_advice=lambda: advise)
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([9, 1])), true_values(INT8)[[9, 1]], strict=True)
    table.close()


@pytest.mark.parametrize("open_store", OPEN)
def test_rows_are_right_while_another_thread_requests(tmp_path: Path, open_store: Open) -> None:
    spec = wide_spec(tmp_path, 500, PAGE)
    values, table = wide_values(tmp_path, spec), opened(open_store, tmp_path, spec)
    batches = np.random.default_rng(1).integers(0, 500, (300, 16))
    with ThreadPoolExecutor(1) as other:
        requests = [other.submit(table.request, batch) for batch in batches[::-1]]
        for index, batch in enumerate(batches):
            if index % 50 == 0:
                evict(tmp_path / "wide.bin")
            np.testing.assert_array_equal(gathered(table, PAGE, batch), values[batch], strict=True)
        assert [request.result() for request in requests] == [None] * 300
    assert table.counters.rows == 300 * 16
    table.close()


@pytest.mark.parametrize("open_store", OPEN)
def test_rows_that_were_evicted_come_back(tmp_path: Path, open_store: Open) -> None:
    spec = wide_spec(tmp_path, 40, PAGE)
    table = opened(open_store, tmp_path, spec)
    for _ in range(3):
        np.testing.assert_array_equal(
            gathered(table, PAGE, as_ids([9, 3])), wide_values(tmp_path, spec)[[9, 3]], strict=True
        )
        evict(tmp_path / "wide.bin")
    table.close()


def test_after_a_page_had_to_be_waited_for_all_are_asked_for_again(tmp_path: Path) -> None:
    advice = RecordedAdvice()
    table = mapped(tmp_path, wide_spec(tmp_path, 40, PAGE), advice)
    gathered(table, PAGE, as_ids([9, 3]))
    evict(tmp_path / "wide.bin")
    before = table.counters.cold
    faults = major_faults_of(lambda: gathered(table, PAGE, as_ids([9, 3])))
    if not faults:
        pytest.skip("this file system keeps its files in memory")
    gathered(table, PAGE, as_ids([9]))
    assert table.counters.cold == before + 1
    table.close()


def test_pages_that_other_threads_waited_for_are_noticed_too(tmp_path: Path) -> None:
    """A library's threads share many rows, so the one that asked for them has no fault of its own."""
    spec = wide_spec(tmp_path, SHARED_FROM_ROWS, PAGE)
    plain = decoder(spec)
    with ThreadPoolExecutor(1) as other:

        def decode(memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: NDArray[np.float32]) -> None:
            other.submit(plain, memory, offsets, out).result()

        table = MappedTable(spec, lambda rows: tmp_path / rows.file, decode)
        gathered(table, PAGE, np.arange(SHARED_FROM_ROWS))
        evict(tmp_path / "wide.bin")
        if not major_faults_of(lambda: gathered(table, PAGE, np.arange(SHARED_FROM_ROWS))):
            pytest.skip("this file system keeps its files in memory")
        gathered(table, PAGE, as_ids([9]))
        assert table.counters.cold == SHARED_FROM_ROWS + 1
        table.close()


def major_faults_of(work: Callable[[], object]) -> int:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    work()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before)


@pytest.mark.parametrize("open_store", ON_DISK)
def test_a_truncated_file_is_an_error_until_it_is_whole_again(tmp_path: Path, open_store: Open) -> None:
    spec, path = wide_spec(tmp_path, 40, PAGE), tmp_path / "wide.bin"
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:  # open for writing: nobody gets a lease of it
        table = opened(open_store, tmp_path, spec)
        gathered(table, PAGE, as_ids([39, 0]))
        file.truncate(len(data) - PAGE)
        with pytest.raises(TableError) as caught:
            gathered(table, PAGE, as_ids([0, 39]))
        assert str(caught.value) == f"table file {path} ends before byte {len(data)}: it was truncated"
        file.write(data)
    np.testing.assert_array_equal(gathered(table, PAGE, as_ids([39])), wide_values(tmp_path, spec)[[39]], strict=True)
    table.close()


def test_a_program_that_truncates_a_mapped_file_waits_and_the_table_is_read_from_then_on(tmp_path: Path) -> None:
    spec, path = wide_spec(tmp_path, 40, PAGE), tmp_path / "wide.bin"
    if not can_lease(path):
        pytest.skip("this file system or user gets no leases")
    data, values, table = path.read_bytes(), wide_values(tmp_path, spec), opened(MappedTable, tmp_path, spec)
    other = threading.Thread(target=os.truncate, args=(path, len(data) - PAGE))
    other.start()

    def gather_until_it_is_done() -> None:
        while other.is_alive():
            np.testing.assert_array_equal(gathered(table, PAGE, as_ids([0, 30])), values[[0, 30]], strict=True)

    message = f"table file {path} is being changed by another program; its table is no longer mapped but read"
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
        gather_until_it_is_done()
    with pytest.raises(TableError, match="it was truncated"):
        gathered(table, PAGE, as_ids([0, 39]))
    path.write_bytes(data)
    np.testing.assert_array_equal(gathered(table, PAGE, as_ids([39])), values[[39]], strict=True)
    table.close()


def test_a_lease_whose_time_was_over_is_no_error(tmp_path: Path) -> None:
    spec, path = joined_spec(tmp_path), tmp_path / "records.bin"
    if not can_lease(path):
        pytest.skip("this file system or user gets no leases")
    table = opened(MappedTable, tmp_path, spec)
    (descriptor,) = (int(link.name) for link in Path("/proc/self/fd").iterdir() if link.resolve() == path.resolve())
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # as the system does after 45 s
    with pytest.warns(RuntimeWarning, match="its table is no longer mapped but read$"):
        found = gathered(table, COLUMNS, as_ids([39, 1]))
    np.testing.assert_array_equal(found, true_values(INT8)[[39, 1]], strict=True)
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([2])), true_values(INT8)[[2]], strict=True)
    table.close()


def test_a_closed_table_keeps_nobody_from_its_files(tmp_path: Path) -> None:
    opened(MappedTable, tmp_path, joined_spec(tmp_path)).close()
    os.close(os.open(tmp_path / "records.bin", os.O_RDWR | os.O_NONBLOCK))  # BlockingIOError while there is a lease


def test_a_file_open_for_writing_gets_no_lease(tmp_path: Path) -> None:
    path = tmp_path / "records.bin"
    joined_spec(tmp_path)
    granted = can_lease(path)
    with path.open("r+b"):
        assert not can_lease(path)
    assert can_lease(path) == granted
    assert not can_lease(tmp_path / "gone")


def test_of_many_files_those_are_checked_that_rows_are_in(tmp_path: Path) -> None:
    spec = sharded_spec(tmp_path)
    with (tmp_path / "scales39.bin").open("r+b") as file:
        table = opened(MappedTable, tmp_path, spec)
        file.truncate(1)
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([38, 0])), true_values(INT8)[[38, 0]], strict=True)
    with pytest.raises(TableError) as caught:
        gathered(table, COLUMNS, as_ids([0, 39]))
    assert str(caught.value) == f"table file {tmp_path / 'scales39.bin'} ends before byte 2: it was truncated"
    table.close()


def test_a_file_truncated_after_the_check_is_an_error_of_the_wave(tmp_path: Path) -> None:
    advice, path, spec = RecordedAdvice(), tmp_path / "wide.bin", wide_spec(tmp_path, 40, PAGE)
    with path.open("r+b") as file:
        table = mapped(tmp_path, spec, advice)
        advice.before = lambda: os.truncate(file.fileno(), 3 * PAGE)
        with pytest.raises(TableError) as caught:
            gathered(table, PAGE, as_ids([0, 30]))
    assert str(caught.value) == f"table file {path} ends before byte {31 * PAGE + 100}: it was truncated"
    table.close()


@pytest.mark.parametrize("open_store", OPEN)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_removed_or_replaced_under_an_open_table_still_gives_its_rows(
    tmp_path: Path, open_store: Open, replaced: bool
) -> None:
    spec = joined_spec(tmp_path)
    table = opened(open_store, tmp_path, spec)
    (tmp_path / "records.bin").unlink()
    if replaced:
        (tmp_path / "records.bin").write_bytes(b"another file")
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([39, 1])), true_values(INT8)[[39, 1]], strict=True)
    table.close()


def test_a_resident_table_needs_its_files_no_more(tmp_path: Path) -> None:
    table = opened(ResidentTable.load, tmp_path, joined_spec(tmp_path))
    os.truncate(tmp_path / "records.bin", 0)
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([39])), true_values(INT8)[[39]], strict=True)


def test_an_io_error_while_reading_is_named_and_the_next_batch_works(tmp_path: Path) -> None:
    spec, read = joined_spec(tmp_path), FailingReads()
    table = PreadTable.open(spec, lambda rows: tmp_path / rows.file, decoder(spec), read=read)
    read.broken = True
    with pytest.raises(TableError) as caught:
        gathered(table, COLUMNS, as_ids([2]))
    assert str(caught.value) == f"table file {tmp_path / 'records.bin'} can't be read at 116: Input/output error"
    read.broken = False
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([2])), true_values(INT8)[[2]], strict=True)
    table.close()


def test_a_page_of_a_map_that_cannot_be_read_is_named_and_the_next_batch_works(tmp_path: Path) -> None:
    spec, read, advice = joined_spec(tmp_path), FailingReads(), RecordedAdvice()
    table = mapped(tmp_path, spec, advice, read)
    read.broken, advice.fails = True, POPULATE_READ
    with pytest.raises(TableError) as caught:
        gathered(table, COLUMNS, as_ids([2]))
    assert str(caught.value) == f"table file {tmp_path / 'records.bin'} can't be read at 116: Input/output error"
    read.broken, advice.fails = False, None
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([2])), true_values(INT8)[[2]], strict=True)
    table.close()


def test_after_an_interrupted_wait_nothing_is_taken_for_present(tmp_path: Path) -> None:
    advice = RecordedAdvice()
    table = mapped(tmp_path, split_spec(tmp_path), advice)

    def interrupt() -> None:
        if advice.told[-1][0] == POPULATE_READ:
            raise KeyboardInterrupt

    advice.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        gathered(table, COLUMNS, as_ids([2]))
    advice.before = lambda: None
    np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([2])), true_values(INT8)[[2]], strict=True)
    assert [advised for advised, _ in advice.told] == [WILL_NEED, POPULATE_READ] * 2
    table.close()


def test_pages_a_map_did_not_give_are_read_and_asked_for_again(tmp_path: Path) -> None:
    advice = RecordedAdvice()
    table = mapped(tmp_path, split_spec(tmp_path), advice)
    advice.fails = POPULATE_READ
    for _ in range(2):
        np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([2])), true_values(INT8)[[2]], strict=True)
    assert [advised for advised, _ in advice.told] == [WILL_NEED, POPULATE_READ] * 2
    table.close()


def test_a_hundred_shards_are_one_range_of_addresses(tmp_path: Path) -> None:
    values = random_records(200, 4)
    ranges: list[RowRange] = []
    for shard in range(100):
        (tmp_path / f"{shard}.bin").write_bytes(bytes(3) + as_bytes(values[2 * shard : 2 * shard + 2]).tobytes())
        ranges.append(row_range(f"{shard}.bin", 2 * shard, 2, offset=3))
    record = row_format("int8", "none", columns=4)
    spec = table_spec(record, [TablePart(row_bytes=4, ranges=tuple(ranges))], rows=200)
    row_ids = np.random.default_rng(1).integers(0, 200, 500)
    for open_store in OPEN:
        table = opened(open_store, tmp_path, spec)
        np.testing.assert_array_equal(gathered(table, 4, row_ids), record.decode(values)[row_ids], strict=True)
        table.close()
