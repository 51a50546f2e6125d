"""Small tables on disk in every layout, with the values they were made of."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engram_runtime.keyer_spec import TokenKeyerSpec
from engram_runtime.records import NO_FACTOR, RecordFormat
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.record_file import Read

ROWS, COLUMNS = 40, 6
OFFSET = 100  # bytes before the first record, as a header has them
NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}
SCALE_DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "float32": np.float32,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
FORMATS = [
    ("float32", "none"),
    ("float16", "none"),
    ("bfloat16", "none"),
    ("int8", "none"),
    ("int8", "float16"),
    ("int8", "float32"),
]


def row_format(
    payload: str, scale: str, *, columns: int = COLUMNS, scale_columns: int | None = None, factor: str = NO_FACTOR
) -> RecordFormat:
    """Return a record format, with one scale a row unless told otherwise."""
    return RecordFormat(
        payload=payload, columns=columns, scale=scale, scale_columns=scale_columns or columns, factor=factor
    )


INT8 = row_format("int8", "float16")


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


def table_spec(record: RecordFormat, parts: Sequence[TablePart], rows: int = ROWS) -> TableSpec:
    keyer = TokenKeyerSpec(vocab_size=rows, pad_id=0)
    return TableSpec(site="layer_1", num_rows=rows, record=record, parts=tuple(parts), keyer=keyer)


def write_part(path: Path, values: NDArray[np.uint8]) -> TablePart:
    """Write rows ``[N, row_bytes]`` into one file."""
    path.write_bytes(bytes(OFFSET) + values.tobytes())
    return TablePart(row_bytes=values.shape[1], ranges=(row_range(path.name, 0, len(values)),))


def row_range(file: str, first_row: int, num_rows: int, offset: int = OFFSET) -> RowRange:
    return RowRange(first_row=first_row, num_rows=num_rows, file=file, external=False, offset=offset)


def open_file(folder: Path, spec: TableSpec, read: Read = os.preadv) -> FileTable:
    return FileTable(spec, lambda rows: folder / rows.file, read=read)


def joined_spec(folder: Path, record: RecordFormat = INT8, rows: int = ROWS) -> TableSpec:
    """Payload and scale of a row side by side in one file."""
    return table_spec(record, [write_part(folder / "records.bin", records(record, rows))], rows)


def split_spec(folder: Path, record: RecordFormat = INT8) -> TableSpec:
    """Payload in one file, scales in another."""
    payload, scales = payload_and_scales(record)
    assert scales is not None
    parts = [
        write_part(folder / "payload.bin", as_bytes(payload)),
        write_part(folder / "scales.bin", as_bytes(scales)),
    ]
    return table_spec(record, parts)


def sharded_spec(folder: Path, record: RecordFormat = INT8, starts: Sequence[int] = (0, 7, 8, 30)) -> TableSpec:
    """Payload in ranges that begin at ``starts``, backwards in one file and with a gap, scales in three files."""
    payload, scales = payload_and_scales(record)
    assert scales is not None
    data, ranges = bytes(OFFSET), []
    for start, stop in reversed(list(zip(starts, [*starts[1:], ROWS], strict=True))):
        ranges.append(row_range("payload.bin", start, stop - start, len(data)))
        data += as_bytes(payload[start:stop]).tobytes() + b"gap"
    (folder / "payload.bin").write_bytes(data)
    scale_ranges = [
        row_range(f"scales{start}.bin", start, stop - start, 0) for start, stop in ((0, 1), (1, 39), (39, ROWS))
    ]
    for rows in scale_ranges:
        values = scales[rows.first_row : rows.first_row + rows.num_rows]
        (folder / rows.file).write_bytes(as_bytes(values).tobytes())
    parts = [
        TablePart(row_bytes=record.payload_bytes, ranges=tuple(reversed(ranges))),
        TablePart(row_bytes=record.record_bytes - record.payload_bytes, ranges=tuple(scale_ranges)),
    ]
    return table_spec(record, parts)


def joined_table(folder: Path, record: RecordFormat = INT8, read: Read = os.preadv) -> FileTable:
    return open_file(folder, joined_spec(folder, record), read)


def split_table(folder: Path, record: RecordFormat = INT8, read: Read = os.preadv) -> FileTable:
    return open_file(folder, split_spec(folder, record), read)


def sharded_table(folder: Path, starts: Sequence[int] = (0, 7, 8, 30), read: Read = os.preadv) -> FileTable:
    return open_file(folder, sharded_spec(folder, starts=starts), read)


def as_ids(row_ids: list[int]) -> NDArray[np.int64]:
    return np.array(row_ids, dtype=np.int64)


class RecordedReads:
    """Reads as `os.preadv` does, at most ``most`` bytes at a time, and keeps offset and bytes of those that waited."""

    def __init__(self, most: int | None = None) -> None:
        self.waited: list[tuple[int, int]] = []
        self._most = most

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        if flags:
            raise BlockingIOError(errno.EAGAIN, "nothing is in memory")
        self.waited.append((offset, len(buffers[0])))
        return os.preadv(descriptor, [buffers[0][: self._most]], offset)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a listing of descriptors, not of files
