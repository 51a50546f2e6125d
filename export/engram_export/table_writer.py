"""Write a table: its records copied or quantised anew into the bundle, or row ranges that refer to the checkpoint."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_export.host_table import TableSource
from engram_export.journal import Facts
from engram_export.repack import PAYLOADS, RowErrors, check_rows, encode_rows, repacked_format
from engram_export.weights_file import TABLE_ALIGNMENT, SafetensorsWriter, check_finite
from engram_runtime.bundle import file_identity
from engram_runtime.errors import RequestError
from engram_runtime.keyer_spec import KeyerSpec, NgramKeyerSpec
from engram_runtime.records import RecordFormat
from engram_runtime.safetensors_layout import SafetensorsLayout, TensorPlan
from engram_runtime.site import Site
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.checksums import write_checksums
from engram_runtime.tables.files import FileTable

SLICE_BYTES = 8 << 20  # of records copied, or of float32 values repacked, at a time
FILE_BYTES = 4 << 30  # of records in a file: what is lost when an export is interrupted stays small
RECORDS = "records"
INTEGER_PAYLOADS = ("int8", "int4")
Progress = Callable[[int], None]


class Once(Protocol):
    """Writes a file that is not finished yet."""

    def __call__(self, path: Path, write: Callable[[], Facts], progress: Progress) -> Facts:
        """Return what ``write`` returned, now or when the file was written; ``progress`` is told of one that was."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenTable:
    """A table as the bundle holds it; ``errors`` is None where its rows are the checkpoint's own."""

    spec: TableSpec
    errors: RowErrors | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """A file of the bundle with consecutive records of a table, known before it is written."""

    path: Path
    first_row: int
    num_rows: int
    record_bytes: int

    @property
    def plan(self) -> TensorPlan:
        """The file's only tensor: ``records [num_rows, record_bytes]``."""
        return TensorPlan(RECORDS, "uint8", (self.num_rows, self.record_bytes))

    @property
    def checksums(self) -> Path:
        """Where its checksums go."""
        return self.path.with_suffix(".crc32")

    @property
    def rows(self) -> RowRange:
        """The file as the manifest describes it."""
        layout = SafetensorsLayout.of([self.plan], alignment=TABLE_ALIGNMENT)
        return RowRange(
            first_row=self.first_row,
            num_rows=self.num_rows,
            file=f"{self.path.parent.name}/{self.path.name}",
            external=False,
            offset=layout.offsets[RECORDS],
            checksums=f"{self.checksums.parent.name}/{self.checksums.name}",
        )


def check_table_options(mode: str, dtype: str | None) -> None:
    """Refuse a table dtype where nothing is repacked, and repacking without one; raises RequestError."""
    if mode == "repack" and dtype is None:
        raise RequestError(f"--tables repack needs --table-dtype, one of {', '.join(PAYLOADS)}")
    if mode != "repack" and dtype is not None:
        raise RequestError(f"--table-dtype {dtype} has no effect with --tables {mode}; use --tables repack")


def written_format(record: RecordFormat, dtype: str | None) -> RecordFormat:
    """Return the format of the records in the bundle: repacked as ``dtype``, or the checkpoint's own."""
    return record if dtype is None else repacked_format(record.columns, dtype)


def reference_table(source: TableSource, keyer: KeyerSpec) -> TableSpec:
    """Refer to the rows where they lie; nothing is written, and the checkpoint must stay where it is."""
    identities = {path: file_identity(path) for path in {tensor.path for part in source.parts for tensor in part}}
    parts = []
    for tensors in source.parts:
        ranges, first_row = [], 0
        for tensor in tensors:
            ranges.append(
                RowRange(
                    first_row=first_row,
                    num_rows=tensor.num_rows,
                    file=str(tensor.path),
                    external=True,
                    offset=tensor.offset,
                    identity=identities[tensor.path],
                )
            )
            first_row += tensor.num_rows
        parts.append(TablePart(row_bytes=tensors[0].row_bytes, ranges=tuple(ranges)))
    return _table_spec(source, keyer, source.record, parts)


def open_rows(source: TableSource) -> FileTable:
    """Open the checkpoint's own rows; the caller closes them."""
    return FileTable(reference_table(source, source.keyer), lambda rows: Path(rows.file))


def checkpoint_site(source: TableSource, vocab_size: int, rows: FileTable) -> Site:
    """Return the site as the checkpoint has it: what the bundle's site is held against."""
    token_map = None if source.token_map is None else source.token_map.astype(np.int64)
    return Site(reference_table(source, source.keyer), source.keyer.keyer(vocab_size, token_map), rows)


def write_now(path: Path, write: Callable[[], Facts], progress: Progress) -> Facts:
    """Write a file whatever is there already; see `Once`."""
    return write()


def copy_table(
    source: TableSource, keyer: KeyerSpec, folder: Path, progress: Progress, once: Once = write_now
) -> WrittenTable:
    """Copy a table into ``folder``, payload and scales of a row together.

    Raises:
        CheckpointError: a value that is not finite, with its row and column.
    """
    files = table_files(source, source.record, folder)
    with open_rows(source) as rows:
        for file in files:
            once(file.path, partial(_copy_rows, rows, file, source.record, progress), progress)
            sum_up(file, once)
    return WrittenTable(spec=_written_spec(source, keyer, source.record, files), errors=None)


def repack_table(
    source: TableSource, keyer: KeyerSpec, dtype: str, folder: Path, progress: Progress, once: Once = write_now
) -> WrittenTable:
    """Quantise a table anew into ``folder``, row by row.

    Args:
        dtype: ``int8``, ``int4`` or ``fp8``.

    Raises:
        CheckpointError: a row that can't be, named.
    """
    record = repacked_format(source.record.columns, dtype)
    files = table_files(source, record, folder)
    errors = []
    with open_rows(source) as rows:
        for file in files:
            facts = once(file.path, partial(_repack_rows, rows, file, source.record, record, progress), progress)
            assert facts is not None
            sum_up(file, once)
            errors.append(RowErrors(num_rows=file.num_rows, mean=facts["mean"], max=facts["max"]))
    return WrittenTable(spec=_written_spec(source, keyer, record, files), errors=sum(errors[1:], start=errors[0]))


def table_files(source: TableSource, record: RecordFormat, folder: Path) -> list[TableFile]:
    """Split a table of such records into files of at most `FILE_BYTES`."""
    step = max(1, FILE_BYTES // record.record_bytes)
    starts = range(0, source.num_rows, step)
    return [
        TableFile(
            path=folder / f"{source.site}-{number:05}-of-{len(starts):05}.safetensors",
            first_row=start,
            num_rows=min(step, source.num_rows - start),
            record_bytes=record.record_bytes,
        )
        for number, start in enumerate(starts, start=1)
    ]


def write_table_file(file: TableFile, blocks: Iterable[NDArray[np.uint8]], progress: Progress) -> None:
    """Write one file from blocks of records ``[n, record_bytes]`` in row order."""
    start = 0
    with SafetensorsWriter(file.path, [file.plan], alignment=TABLE_ALIGNMENT) as writer:
        for block in blocks:
            writer.write_rows(RECORDS, start, block)
            start += len(block)
            progress(block.nbytes)


def write_token_map(source: TableSource, folder: Path, once: Once = write_now) -> KeyerSpec:
    """Write the token map, little-endian int32, where the table has one; return the table's keyer."""
    if source.token_map is None:
        return source.keyer
    assert isinstance(source.keyer, NgramKeyerSpec)
    path, data = folder / f"{source.site}.token_map.int32", source.token_map.astype("<i4").tobytes()
    once(path, lambda: _write_bytes(path, data), lambda count: None)
    return dataclasses.replace(source.keyer, token_map=f"{folder.name}/{path.name}")


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def sum_up(file: TableFile, once: Once = write_now) -> None:
    """Write the checksums of a file that is finished."""
    once(file.checksums, partial(write_checksums, file.path, file.checksums), lambda count: None)


def _slices(rows: FileTable, file: TableFile, row_bytes: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the checkpoint's records of a file's rows; ``row_bytes`` is what a row takes while it is worked on."""
    step = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, file.num_rows, step):
        yield rows.read_rows(file.first_row + start, min(step, file.num_rows - start))


def _copy_rows(rows: FileTable, file: TableFile, record: RecordFormat, progress: Progress) -> None:
    write_table_file(file, _finite_slices(rows, file, record), progress)


def _finite_slices(rows: FileTable, file: TableFile, record: RecordFormat) -> Iterator[NDArray[np.uint8]]:
    """Yield the checkpoint's records of a file's rows; raises CheckpointError where a value is not finite."""
    first_row = file.first_row
    for block in _slices(rows, file, 4 * record.columns):
        if record.payload not in INTEGER_PAYLOADS:  # of those, scales alone can be anything, and were checked
            check_finite("the table's rows", first_row, record.decode(block))
        first_row += len(block)
        yield block


def _repack_rows(
    rows: FileTable, file: TableFile, record: RecordFormat, target: RecordFormat, progress: Progress
) -> Facts:
    """Write a file of repacked records; returns how far its rows are off."""
    errors: list[RowErrors] = []
    write_table_file(file, _repacked(rows, file, record, target, errors), progress)
    total = sum(errors[1:], start=errors[0])
    return {"mean": total.mean, "max": total.max}


def _repacked(
    rows: FileTable, file: TableFile, record: RecordFormat, target: RecordFormat, errors: list[RowErrors]
) -> Iterator[NDArray[np.uint8]]:
    """Yield repacked records of a file's rows, and append how far they are off."""
    first_row = file.first_row
    for block in _slices(rows, file, 4 * record.columns):
        values = record.decode(block)
        check_rows(values, first_row)
        repacked = encode_rows(values, target)
        errors.append(RowErrors.of(values, target.decode(repacked)))
        first_row += len(block)
        yield repacked


def _written_spec(source: TableSource, keyer: KeyerSpec, record: RecordFormat, files: Sequence[TableFile]) -> TableSpec:
    part = TablePart(row_bytes=record.record_bytes, ranges=tuple(file.rows for file in files))
    return _table_spec(source, keyer, record, [part])


def _table_spec(source: TableSource, keyer: KeyerSpec, record: RecordFormat, parts: Sequence[TablePart]) -> TableSpec:
    return TableSpec(site=source.site, num_rows=source.num_rows, record=record, parts=tuple(parts), keyer=keyer)
