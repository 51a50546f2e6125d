"""Tables: files and memory give the same rows as numpy, and damage is an error with its place."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from tests.rows import gathered
from tests.small_tables import (
    COLUMNS,
    FORMATS,
    INT8,
    OFFSET,
    ROWS,
    SCALE_DTYPES,
    RecordedReads,
    as_bytes,
    as_ids,
    joined_spec,
    joined_table,
    open_descriptors,
    open_file,
    records,
    row_format,
    row_range,
    sharded_spec,
    sharded_table,
    split_spec,
    split_table,
    table_spec,
    true_values,
    write_part,
)

from engram_runtime.errors import BundleError, TableError
from engram_runtime.records import NO_FACTOR, PAYLOAD_BITS, SCALE_BYTES, RecordFormat
from engram_runtime.table_spec import TablePart, TableSpec
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.store import TableStore, check_row_ids

Specify = Callable[[Path], TableSpec]
READERS: list[Callable[[Path], FileTable]] = [joined_table, split_table, sharded_table]
LAYOUTS: list[Specify] = [joined_spec, split_spec, sharded_spec]


@pytest.mark.parametrize(("payload", "scale"), FORMATS)
def test_rows_from_a_file_equal_numpy(tmp_path: Path, payload: str, scale: str) -> None:
    record = row_format(payload, scale)
    with joined_table(tmp_path, record) as table:
        np.testing.assert_array_equal(gathered(table, COLUMNS, np.arange(ROWS)), true_values(record), strict=True)


@pytest.mark.parametrize(("payload", "scale"), FORMATS)
def test_all_records_of_a_file_are_those_written(tmp_path: Path, payload: str, scale: str) -> None:
    record = row_format(payload, scale)
    with joined_table(tmp_path, record) as table:
        np.testing.assert_array_equal(table.read_all(), records(record), strict=True)


@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_payload_and_scales_in_two_files_equal_joined_records(tmp_path: Path, scale: str) -> None:
    record = row_format("int8", scale)
    row_ids = as_ids([3, 0, 39, 3])
    with joined_table(tmp_path, record) as joined, split_table(tmp_path, record) as split:
        np.testing.assert_array_equal(
            gathered(split, COLUMNS, row_ids), gathered(joined, COLUMNS, row_ids), strict=True
        )
        np.testing.assert_array_equal(split.read_all(), joined.read_all(), strict=True)


@pytest.mark.parametrize("store", READERS)
@settings(deadline=None)
@given(row_ids=st.lists(st.integers(0, ROWS - 1), max_size=60))
def test_order_and_duplicates_are_kept(
    tmp_path_factory: pytest.TempPathFactory, store: Callable[[Path], TableStore], row_ids: list[int]
) -> None:
    table = store(tmp_path_factory.getbasetemp())
    values = gathered(table, COLUMNS, as_ids(row_ids))
    table.close()
    np.testing.assert_array_equal(values, true_values(INT8)[row_ids], strict=True)


def test_each_distinct_row_is_read_once_in_file_order(tmp_path: Path) -> None:
    reads = RecordedReads()
    with joined_table(tmp_path, read=reads) as table:
        gathered(table, COLUMNS, as_ids([9, 2, 9, 5, 2]))
    size = INT8.record_bytes
    assert reads.waited == [(OFFSET + row * size, size) for row in (2, 5, 9)]


@pytest.mark.parametrize("outside", [-1, -(2**63), ROWS, 2**63 - 1])
@pytest.mark.parametrize("store", READERS)
def test_a_row_id_outside_the_table_is_named(tmp_path: Path, store: Callable[[Path], TableStore], outside: int) -> None:
    table = store(tmp_path)
    with pytest.raises(IndexError) as caught:
        gathered(table, COLUMNS, as_ids([0, outside, ROWS - 1]))
    table.close()
    assert str(caught.value) == f"row id {outside} is outside [0, 40)"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_read_if_a_row_id_is_outside(tmp_path: Path, layout: Specify) -> None:
    reads = RecordedReads()
    with open_file(tmp_path, layout(tmp_path), reads) as table, pytest.raises(IndexError):
        gathered(table, COLUMNS, as_ids([0, ROWS]))
    assert reads.waited == []


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
@pytest.mark.parametrize("layout", LAYOUTS)
def test_short_reads_are_continued(tmp_path: Path, layout: Specify, most: int) -> None:
    with open_file(tmp_path, layout(tmp_path), RecordedReads(most)) as table:
        np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([5, 1])), true_values(INT8)[[5, 1]], strict=True)
        np.testing.assert_array_equal(table.read_all(), records(INT8), strict=True)


def test_a_file_one_byte_short_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "records.bin"
    part = write_part(path, records(INT8))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TableError) as caught:
        open_file(tmp_path, table_spec(INT8, [part]))
    assert str(caught.value) == f"table file {path} holds 419 bytes, its rows need 420; export it again"


def test_a_file_truncated_while_open_is_named_with_the_byte_it_lacks(tmp_path: Path) -> None:
    with joined_table(tmp_path) as table:
        os.truncate(tmp_path / "records.bin", 419)
        with pytest.raises(TableError) as caught:
            gathered(table, COLUMNS, as_ids([0, ROWS - 1]))
    assert str(caught.value) == f"table file {tmp_path / 'records.bin'} ends before byte 420: it was truncated"


def test_rows_before_the_truncation_can_still_be_read(tmp_path: Path) -> None:
    with joined_table(tmp_path) as table:
        os.truncate(tmp_path / "records.bin", 419)
        np.testing.assert_array_equal(gathered(table, COLUMNS, as_ids([38])), true_values(INT8)[[38]], strict=True)


def test_a_table_truncated_while_it_is_read_whole_is_named(tmp_path: Path) -> None:
    with joined_table(tmp_path) as table:
        os.truncate(tmp_path / "records.bin", 150)
        with pytest.raises(TableError) as caught:
            table.read_all()
    assert str(caught.value) == f"table file {tmp_path / 'records.bin'} ends before byte 420: it was truncated"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    part = TablePart(row_bytes=INT8.record_bytes, ranges=(row_range("gone.bin", 0, ROWS),))
    with pytest.raises(TableError) as caught:
        open_file(tmp_path, table_spec(INT8, [part]))
    expected = f"table file {tmp_path / 'gone.bin'} can't be opened: No such file or directory; export the bundle again"
    assert str(caught.value) == expected


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    part = TablePart(row_bytes=1, ranges=(row_range("folder", 0, 2, offset=0),))
    (tmp_path / "folder").mkdir()
    with (
        open_file(tmp_path, table_spec(row_format("int8", "none", columns=1), [part], rows=2)) as table,
        pytest.raises(TableError) as caught,
    ):
        gathered(table, COLUMNS, as_ids([1]))
    assert str(caught.value) == f"table file {tmp_path / 'folder'} can't be read at 1: Is a directory"


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    part = TablePart(row_bytes=INT8.record_bytes, ranges=(row_range("pipe", 0, ROWS, offset=0),))
    with pytest.raises(TableError) as caught:
        open_file(tmp_path, table_spec(INT8, [part]))
    assert str(caught.value) == f"table file {path} holds 0 bytes, its rows need 320; export it again"


def test_no_file_stays_open_if_a_later_one_is_missing(tmp_path: Path) -> None:
    payload = write_part(tmp_path / "payload.bin", records(INT8)[:, :COLUMNS])
    scales = TablePart(row_bytes=2, ranges=(row_range("gone.bin", 0, ROWS),))
    before = open_descriptors()
    with pytest.raises(TableError):
        open_file(tmp_path, table_spec(INT8, [payload, scales]))
    assert open_descriptors() == before


@pytest.mark.parametrize("reader", READERS)
def test_a_closed_table_holds_no_file_open(tmp_path: Path, reader: Callable[[Path], FileTable]) -> None:
    before = open_descriptors()
    reader(tmp_path).close()
    assert open_descriptors() == before


@pytest.mark.parametrize("store", READERS)
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
        gathered(table, COLUMNS, as_ids([0]))


@pytest.mark.parametrize(
    ("payload", "scale", "columns", "payload_bytes", "record_bytes"),
    [
        ("float32", "none", 5, 20, 20),
        ("float16", "none", 5, 10, 10),
        ("bfloat16", "none", 5, 10, 10),
        ("int8", "none", 5, 5, 5),
        ("int8", "float16", 5, 5, 7),
        ("int8", "float32", 5, 5, 9),
        ("int8", "e8m0", 5, 5, 6),
        ("int4", "float16", 6, 3, 5),
        ("float8_e4m3", "none", 5, 5, 5),
    ],
)
def test_a_record_has_the_bytes_of_its_values_and_its_scale(
    payload: str, scale: str, columns: int, payload_bytes: int, record_bytes: int
) -> None:
    record = row_format(payload, scale, columns=columns)
    assert (record.payload_bytes, record.record_bytes) == (payload_bytes, record_bytes)


@settings(deadline=None)
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20))
def test_every_bfloat16_is_read_as_ml_dtypes_reads_it(bits: list[int]) -> None:
    record = row_format("bfloat16", "none", columns=len(bits))
    raw = np.array([bits], dtype=np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # signalling NaNs
        expected = raw.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(record.decode(as_bytes(raw)), expected, strict=True)


@pytest.mark.parametrize(("payload", "scale"), [("int2", "none"), ("int8", "bfloat16"), ("", "")])
def test_an_unknown_record_format_is_refused(payload: str, scale: str) -> None:
    with pytest.raises(BundleError) as caught:
        row_format(payload, scale, columns=4)
    assert str(caught.value) == (
        f"record of {payload} with scale {scale} is unknown; payloads are ['bfloat16', 'float16', 'float32', "
        f"'float8_e4m3', 'int4', 'int8'], scales ['e8m0', 'float16', 'float32', 'none']"
    )


def test_a_block_of_columns_has_a_scale_of_its_own() -> None:
    record = row_format("float8_e4m3", "e8m0", columns=256, scale_columns=32)
    assert (record.payload_bytes, record.num_scales, record.record_bytes) == (256, 8, 264)


def random_bytes(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def test_every_float8_and_every_e8m0_scale_is_read_as_torch_reads_it() -> None:
    record = row_format("float8_e4m3", "e8m0", columns=256, scale_columns=4)
    data = np.concatenate([np.arange(256, dtype=np.uint8), np.arange(60, 124, dtype=np.uint8)])
    payload = torch.from_numpy(data[:256]).view(torch.float8_e4m3fn).float()
    scales = torch.from_numpy(data[256:]).view(torch.float8_e8m0fnu).float()
    expected = (payload.reshape(64, 4) * scales[:, None]).reshape(1, 256)
    np.testing.assert_array_equal(record.decode(data[None]), expected.numpy(), strict=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("payload", list(PAYLOAD_BITS))
@pytest.mark.parametrize("scale", list(SCALE_BYTES))
def test_any_bytes_are_decoded_without_a_warning(payload: str, scale: str) -> None:
    """An infinite scale times zero and the largest one times 448 among them."""
    record = row_format(payload, scale, columns=32, factor="0x1.fffffe0000000p+127")
    codes = random_bytes(3000, record.record_bytes)
    codes[:1000, : record.payload_bytes], codes[:2000:2, record.payload_bytes :] = 0, 0x7F
    assert record.decode(codes).shape == (3000, 32)


@pytest.mark.parametrize("columns", [1, 5, 255])
def test_an_odd_number_of_float8_is_read_as_an_even_one(columns: int) -> None:
    codes = random_bytes(9, columns + 1)
    odd, even = (row_format("float8_e4m3", "none", columns=count) for count in (columns, columns + 1))
    np.testing.assert_array_equal(odd.decode(codes[:, :-1]), even.decode(codes)[:, :-1], strict=True)


def test_every_power_of_two_of_e8m0_is_read_as_ml_dtypes_reads_it() -> None:
    record = row_format("int8", "e8m0", columns=256, scale_columns=1)
    data = np.concatenate([np.ones(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)])
    expected = data[256:].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(record.decode(data[None])[0], expected, strict=True)


def test_int4_is_read_as_onnx_packs_it() -> None:
    values = random_bytes(9, 8).view(np.int8) >> 4
    packed = np.frombuffer(numpy_helper.from_array(values.astype(ml_dtypes.int4)).raw_data, dtype=np.uint8)
    found = row_format("int4", "none", columns=8).decode(packed.reshape(9, 4))
    np.testing.assert_array_equal(found, values.astype(np.float32), strict=True)


@pytest.mark.parametrize("payload", ["int4", "int8", "float8_e4m3"])
@pytest.mark.parametrize("scale", ["float16", "float32", "e8m0"])
@pytest.mark.parametrize("scale_columns", [2, 4, 12])
def test_each_block_of_columns_is_multiplied_by_its_scale(payload: str, scale: str, scale_columns: int) -> None:
    record = row_format(payload, scale, columns=12, scale_columns=scale_columns)
    codes = random_bytes(5, record.payload_bytes) & np.uint8(0x77)  # no NaN
    scales = np.exp2(random_bytes(5, 12 // scale_columns) % 8).astype(SCALE_DTYPES[scale])
    plain = row_format(payload, "none", columns=12).decode(codes)
    wide = np.repeat(scales.astype(np.float32), scale_columns, axis=1)
    np.testing.assert_array_equal(
        record.decode(np.concatenate([codes, as_bytes(scales)], axis=1)), plain * wide, strict=True
    )


def test_the_factor_of_a_table_multiplies_every_value() -> None:
    codes = random_bytes(5, 6) & np.uint8(0x77)
    plain, scaled = (row_format("float8_e4m3", "none", factor=factor) for factor in (NO_FACTOR, "0x1.99999a0000000p-4"))
    np.testing.assert_array_equal(scaled.decode(codes), plain.decode(codes) * np.float32(0.1), strict=True)


@pytest.mark.parametrize("payload", ["int4", "float8_e4m3", "float32"])
def test_no_records_are_no_rows(payload: str) -> None:
    record = row_format(payload, "float16", scale_columns=2)
    assert record.decode(np.empty((0, record.record_bytes), dtype=np.uint8)).shape == (0, COLUMNS)


@pytest.mark.parametrize(
    "factor",
    ["1.0", "0x1p+0", "", "inf", "nan", "0x0.0p+0", "-0x1.0000000000000p+0", "0x1.0000000000001p+0", "0x1p+99999"],
)
def test_a_factor_that_is_no_positive_float32_is_refused(factor: str) -> None:
    with pytest.raises(BundleError) as caught:
        row_format("int8", "none", factor=factor)
    assert str(caught.value) == (
        f"record factor is {factor!r}, expected a positive float32 spelt like 0x1.0000000000000p+0"
    )


@pytest.mark.parametrize(
    ("payload", "scale", "columns", "scale_columns", "expected"),
    [
        ("int8", "none", 0, 0, "record has 0 columns, expected at least 1"),
        ("int4", "none", 5, 5, "record has 5 columns of int4, expected an even number"),
        ("int8", "none", 6, 3, "record without scales has scale_columns 3, expected 6"),
        ("int8", "float16", 6, 4, "record has scale_columns 4, expected a divisor of 6"),
        ("int8", "float16", 6, 12, "record has scale_columns 12, expected a divisor of 6"),
    ],
)
def test_a_record_that_does_not_add_up_is_refused(
    payload: str, scale: str, columns: int, scale_columns: int, expected: str
) -> None:
    with pytest.raises(BundleError) as caught:
        RecordFormat(payload=payload, columns=columns, scale=scale, scale_columns=scale_columns)
    assert str(caught.value) == expected


@settings(max_examples=100, deadline=None)
@given(
    starts=st.sets(st.integers(1, ROWS - 1), max_size=8),
    row_ids=st.lists(st.integers(0, ROWS - 1), max_size=20),
    first=st.integers(0, ROWS),
    count=st.integers(0, ROWS),
)
def test_rows_are_the_same_however_the_table_is_cut_into_ranges(
    tmp_path_factory: pytest.TempPathFactory, starts: set[int], row_ids: list[int], first: int, count: int
) -> None:
    stop = min(first + count, ROWS)
    with sharded_table(tmp_path_factory.getbasetemp(), starts=(0, *sorted(starts))) as table:
        np.testing.assert_array_equal(
            gathered(table, COLUMNS, as_ids(row_ids)), true_values(INT8)[row_ids], strict=True
        )
        np.testing.assert_array_equal(table.read_rows(first, stop - first), records(INT8)[first:stop], strict=True)


def test_no_read_crosses_the_end_of_a_range(tmp_path: Path) -> None:
    reads = RecordedReads()
    with sharded_table(tmp_path, starts=(0, 7), read=reads) as table:
        gathered(table, COLUMNS, as_ids([6, 7]))
    later = 33 * COLUMNS + 3  # rows 7 to 39 and the gap come first in the file
    assert reads.waited == [(OFFSET + later + 6 * COLUMNS, COLUMNS), (OFFSET, COLUMNS), (10, 2), (12, 2)]


def test_a_file_of_many_ranges_is_opened_once(tmp_path: Path) -> None:
    before = open_descriptors()
    with sharded_table(tmp_path):
        assert open_descriptors() == before + 4
