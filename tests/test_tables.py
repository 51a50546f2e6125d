"""Tables: files and memory give the same rows as numpy, and damage is an error with its place."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_runtime.errors import BundleError, TableError
from engram_runtime.manifest import Extent, KeyerSpec, TableSpec
from engram_runtime.records import RecordFormat
from engram_runtime.tables import FileTable, InMemoryTable, TableStore, check_row_ids

ROWS, COLUMNS = 40, 6
OFFSET = 100  # bytes before the first record, as a header has them
NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}
FORMATS = [
    ("float32", "none"),
    ("float16", "none"),
    ("bfloat16", "none"),
    ("int8", "none"),
    ("int8", "float16"),
    ("int8", "float32"),
]
INT8 = RecordFormat(payload="int8", columns=COLUMNS, scale="float16")


def payload_and_scales(record: RecordFormat, rows: int = ROWS) -> tuple[NDArray[Any], NDArray[Any] | None]:
    rng = np.random.default_rng(7)
    spread = 100 if record.payload == "int8" else 3
    payload = (spread * rng.uniform(-1, 1, (rows, record.columns))).astype(NUMPY_DTYPES[record.payload])
    scales = None if record.scale == "none" else rng.uniform(0.001, 0.1, rows).astype(record.scale)
    return payload, scales


def true_values(record: RecordFormat, rows: int = ROWS) -> NDArray[np.float32]:
    """Return the float32 values of every row, straight from the arrays the records are made of."""
    payload, scales = payload_and_scales(record, rows)
    values = payload.astype(np.float32)
    return values if scales is None else values * scales.astype(np.float32)[:, None]


def as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return ``[rows, bytes a row]``."""
    return np.frombuffer(values.tobytes(), dtype=np.uint8).reshape(len(values), -1)


def records(record: RecordFormat, rows: int = ROWS) -> NDArray[np.uint8]:
    payload, scales = payload_and_scales(record, rows)
    parts = [as_bytes(payload)] if scales is None else [as_bytes(payload), as_bytes(scales)]
    return np.concatenate(parts, axis=1)


def table_spec(record: RecordFormat, extents: Sequence[Extent], rows: int = ROWS) -> TableSpec:
    keyer = KeyerSpec(
        kind="xor_prime",
        orders=(2,),
        num_heads=1,
        multipliers=(1, 3),
        primes=(rows,),
        offsets=(0,),
        pad_id=0,
        token_map=None,
    )
    return TableSpec(site="layer_1", num_rows=rows, record=record, extents=tuple(extents), keyer=keyer)


def write_extent(path: Path, values: NDArray[np.uint8]) -> Extent:
    path.write_bytes(bytes(OFFSET) + values.tobytes())
    return Extent(file=path.name, external=False, offset=OFFSET, row_bytes=values.shape[1])


def joined_table(folder: Path, record: RecordFormat = INT8, rows: int = ROWS) -> FileTable:
    """Payload and scale of a row side by side in one file."""
    path = folder / "records.bin"
    extent = write_extent(path, records(record, rows))
    return FileTable(table_spec(record, [extent], rows), [(path, extent)])


def split_table(folder: Path, record: RecordFormat = INT8) -> FileTable:
    """Payload in one file, scales in another."""
    payload, scales = payload_and_scales(record)
    assert scales is not None
    parts = {folder / "payload.bin": as_bytes(payload), folder / "scales.bin": as_bytes(scales)}
    extents = [(path, write_extent(path, values)) for path, values in parts.items()]
    return FileTable(table_spec(record, [extent for _, extent in extents]), extents)


def memory_table(folder: Path) -> InMemoryTable:
    return InMemoryTable(records(INT8), INT8)


def as_ids(row_ids: list[int]) -> NDArray[np.int64]:
    return np.array(row_ids, dtype=np.int64)


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that every read from now on is added to: offset and bytes asked for."""
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        reads.append((offset, sum(len(buffer) for buffer in buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return reads


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a listing of descriptors, not of files


STORES: list[Callable[[Path], TableStore]] = [memory_table, joined_table, split_table]
READERS: list[Callable[[Path], FileTable]] = [joined_table, split_table]


@pytest.mark.parametrize(("payload", "scale"), FORMATS)
def test_rows_from_a_file_equal_numpy(tmp_path: Path, payload: str, scale: str) -> None:
    record = RecordFormat(payload=payload, columns=COLUMNS, scale=scale)
    with joined_table(tmp_path, record) as table:
        np.testing.assert_array_equal(table.gather(np.arange(ROWS)), true_values(record), strict=True)


@pytest.mark.parametrize(("payload", "scale"), FORMATS)
def test_rows_from_memory_equal_numpy(payload: str, scale: str) -> None:
    record = RecordFormat(payload=payload, columns=COLUMNS, scale=scale)
    table = InMemoryTable(records(record), record)
    np.testing.assert_array_equal(table.gather(np.arange(ROWS)), true_values(record), strict=True)


@pytest.mark.parametrize(("payload", "scale"), FORMATS)
def test_all_records_of_a_file_are_those_written(tmp_path: Path, payload: str, scale: str) -> None:
    record = RecordFormat(payload=payload, columns=COLUMNS, scale=scale)
    with joined_table(tmp_path, record) as table:
        np.testing.assert_array_equal(table.read_all(), records(record), strict=True)


@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_payload_and_scales_in_two_files_equal_joined_records(tmp_path: Path, scale: str) -> None:
    record = RecordFormat(payload="int8", columns=COLUMNS, scale=scale)
    row_ids = as_ids([3, 0, 39, 3])
    with joined_table(tmp_path, record) as joined, split_table(tmp_path, record) as split:
        np.testing.assert_array_equal(split.gather(row_ids), joined.gather(row_ids), strict=True)
        np.testing.assert_array_equal(split.read_all(), joined.read_all(), strict=True)


@pytest.mark.parametrize("store", STORES)
@settings(deadline=None)
@given(row_ids=st.lists(st.integers(0, ROWS - 1), max_size=60))
def test_order_and_duplicates_are_kept(
    tmp_path_factory: pytest.TempPathFactory, store: Callable[[Path], TableStore], row_ids: list[int]
) -> None:
    table = store(tmp_path_factory.getbasetemp())
    values = table.gather(as_ids(row_ids))
    table.close()
    np.testing.assert_array_equal(values, true_values(INT8)[row_ids], strict=True)


@pytest.mark.parametrize("store", STORES)
def test_gathered_rows_are_the_callers_own(tmp_path: Path, store: Callable[[Path], TableStore]) -> None:
    table = store(tmp_path)
    table.gather(as_ids([1]))[...] = 0
    values = table.gather(as_ids([1]))
    table.close()
    np.testing.assert_array_equal(values, true_values(INT8)[[1]], strict=True)


def test_float32_rows_from_memory_are_the_callers_own() -> None:
    record = RecordFormat(payload="float32", columns=COLUMNS, scale="none")
    table = InMemoryTable(records(record), record)
    table.gather(as_ids([1]))[...] = 0
    np.testing.assert_array_equal(table.gather(as_ids([1])), true_values(record)[[1]], strict=True)


def test_each_distinct_row_is_read_once_in_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with joined_table(tmp_path) as table:
        reads = reads_of(monkeypatch)
        table.gather(as_ids([9, 2, 9, 5, 2]))
    size = INT8.record_bytes
    assert reads == [(OFFSET + row * size, size) for row in (2, 5, 9)]


@pytest.mark.parametrize("outside", [-1, -(2**63), ROWS, 2**63 - 1])
@pytest.mark.parametrize("store", STORES)
def test_a_row_id_outside_the_table_is_named(tmp_path: Path, store: Callable[[Path], TableStore], outside: int) -> None:
    table = store(tmp_path)
    with pytest.raises(IndexError) as caught:
        table.gather(as_ids([0, outside, ROWS - 1]))
    table.close()
    assert str(caught.value) == f"row id {outside} is outside [0, 40)"


@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_read_if_a_row_id_is_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], FileTable]
) -> None:
    with reader(tmp_path) as table:
        reads = reads_of(monkeypatch)
        with pytest.raises(IndexError):
            table.gather(as_ids([0, ROWS]))
    assert reads == []


@settings(deadline=None)
@given(row_ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8), num_rows=st.integers(0, 2**53))
def test_row_ids_pass_if_and_only_if_all_lie_inside(row_ids: list[int], num_rows: int) -> None:
    outside = [row for row in row_ids if not 0 <= row < num_rows]
    message = None
    try:
        check_row_ids(as_ids(row_ids), num_rows)
    except IndexError as error:
        message = str(error)
    assert message == (f"row id {outside[0]} is outside [0, {num_rows})" if outside else None)


@pytest.mark.parametrize("most", [1, 3, 7])
@pytest.mark.parametrize("reader", READERS)
def test_short_reads_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], FileTable], most: int
) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:most]], offset)

    with reader(tmp_path) as table:
        monkeypatch.setattr(os, "preadv", short)
        np.testing.assert_array_equal(table.gather(as_ids([5, 1])), true_values(INT8)[[5, 1]], strict=True)
        np.testing.assert_array_equal(table.read_all(), records(INT8), strict=True)


def test_a_file_one_byte_short_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "records.bin"
    extent = write_extent(path, records(INT8))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TableError) as caught:
        FileTable(table_spec(INT8, [extent]), [(path, extent)])
    assert str(caught.value) == f"table file {path} holds 419 bytes, its rows need 420; export it again"


def test_a_file_truncated_while_open_is_named_with_the_byte_it_lacks(tmp_path: Path) -> None:
    with joined_table(tmp_path) as table:
        os.truncate(tmp_path / "records.bin", 419)
        with pytest.raises(TableError) as caught:
            table.gather(as_ids([0, ROWS - 1]))
    assert str(caught.value) == f"table file {tmp_path / 'records.bin'} ends before byte 420: it was truncated"


def test_rows_before_the_truncation_can_still_be_read(tmp_path: Path) -> None:
    with joined_table(tmp_path) as table:
        os.truncate(tmp_path / "records.bin", 419)
        np.testing.assert_array_equal(table.gather(as_ids([38])), true_values(INT8)[[38]], strict=True)


def test_a_table_truncated_while_it_is_read_whole_is_named(tmp_path: Path) -> None:
    with joined_table(tmp_path) as table:
        os.truncate(tmp_path / "records.bin", 150)
        with pytest.raises(TableError) as caught:
            table.read_all()
    assert str(caught.value) == f"table file {tmp_path / 'records.bin'} ends before byte 420: it was truncated"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    extent = Extent(file="gone.bin", external=False, offset=0, row_bytes=INT8.record_bytes)
    with pytest.raises(TableError) as caught:
        FileTable(table_spec(INT8, [extent]), [(tmp_path / "gone.bin", extent)])
    expected = f"table file {tmp_path / 'gone.bin'} can't be opened: No such file or directory; export the bundle again"
    assert str(caught.value) == expected


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    extent = Extent(file="folder", external=False, offset=0, row_bytes=1)
    record = RecordFormat(payload="int8", columns=1, scale="none")
    (tmp_path / "folder").mkdir()
    with (
        FileTable(table_spec(record, [extent], rows=2), [(tmp_path / "folder", extent)]) as table,
        pytest.raises(TableError) as caught,
    ):
        table.gather(as_ids([1]))
    assert str(caught.value) == f"table file {tmp_path / 'folder'} can't be read at 1: Is a directory"


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    extent = Extent(file="pipe", external=False, offset=0, row_bytes=INT8.record_bytes)
    with pytest.raises(TableError) as caught:
        FileTable(table_spec(INT8, [extent]), [(path, extent)])
    assert str(caught.value) == f"table file {path} holds 0 bytes, its rows need 320; export it again"


def test_no_file_stays_open_if_a_later_one_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "payload.bin"
    payload = write_extent(path, records(INT8)[:, :COLUMNS])
    scales = Extent(file="gone.bin", external=False, offset=0, row_bytes=2)
    before = open_descriptors()
    with pytest.raises(TableError):
        FileTable(table_spec(INT8, [payload, scales]), [(path, payload), (tmp_path / "gone.bin", scales)])
    assert open_descriptors() == before


@pytest.mark.parametrize("reader", READERS)
def test_a_closed_table_holds_no_file_open(tmp_path: Path, reader: Callable[[Path], FileTable]) -> None:
    before = open_descriptors()
    reader(tmp_path).close()
    assert open_descriptors() == before


@pytest.mark.parametrize("store", STORES)
def test_a_table_may_be_closed_twice(tmp_path: Path, store: Callable[[Path], TableStore]) -> None:
    table = store(tmp_path)
    table.close()
    with (tmp_path / "other").open("wb") as other:  # takes over the number of the closed file
        table.close()
        assert os.fstat(other.fileno()).st_size == 0


@pytest.mark.parametrize("reader", READERS)
def test_a_closed_table_gives_no_rows(tmp_path: Path, reader: Callable[[Path], FileTable]) -> None:
    table = reader(tmp_path)
    table.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        table.gather(as_ids([0]))


@pytest.mark.parametrize(
    ("payload", "scale", "columns", "payload_bytes", "record_bytes"),
    [
        ("float32", "none", 5, 20, 20),
        ("float16", "none", 5, 10, 10),
        ("bfloat16", "none", 5, 10, 10),
        ("int8", "none", 5, 5, 5),
        ("int8", "float16", 5, 5, 7),
        ("int8", "float32", 5, 5, 9),
    ],
)
def test_a_record_has_the_bytes_of_its_values_and_its_scale(
    payload: str, scale: str, columns: int, payload_bytes: int, record_bytes: int
) -> None:
    record = RecordFormat(payload=payload, columns=columns, scale=scale)
    assert (record.payload_bytes, record.record_bytes) == (payload_bytes, record_bytes)


@settings(deadline=None)
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20))
def test_every_bfloat16_is_read_as_ml_dtypes_reads_it(bits: list[int]) -> None:
    record = RecordFormat(payload="bfloat16", columns=len(bits), scale="none")
    raw = np.array([bits], dtype=np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # signalling NaNs
        expected = raw.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(record.decode(as_bytes(raw)), expected, strict=True)


@pytest.mark.parametrize(("payload", "scale"), [("int4", "none"), ("int8", "bfloat16"), ("", "")])
def test_an_unknown_record_format_is_refused(payload: str, scale: str) -> None:
    with pytest.raises(BundleError) as caught:
        RecordFormat(payload=payload, columns=4, scale=scale)
    assert str(caught.value) == (
        f"record of {payload} with scale {scale} is unknown; payloads are ['bfloat16', 'float16', 'float32', 'int8'], "
        f"scales ['float16', 'float32', 'none']"
    )


def test_a_record_without_columns_is_refused() -> None:
    with pytest.raises(BundleError) as caught:
        RecordFormat(payload="int8", columns=0, scale="none")
    assert str(caught.value) == "record has 0 columns, expected at least 1"
