"""Write a site's table: records copied into the bundle, or extents that refer to the checkpoint's own files."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engram_export.engram_source import EngramSource
from engram_export.source_files import read_exactly
from engram_export.weights_file import TABLE_ALIGNMENT, SafetensorsWriter, TensorPlan
from engram_runtime.bundle import file_identity
from engram_runtime.manifest import Extent, KeyerSpec, TableSpec
from engram_runtime.records import RecordFormat

COPY_BYTES = 8 << 20  # rows copied at a time
RECORDS = "records"
Progress = Callable[[int], None]


def copy_table(source: EngramSource, keyer: KeyerSpec, folder: Path, progress: Progress) -> TableSpec:
    """Copy a table as records ``[rows, record_bytes]`` into ``folder``, payload and scale of a row together."""
    record = source.record_format()
    path = folder / f"{source.config.site}-00001-of-00001.safetensors"
    rows = source.config.num_rows
    plan = TensorPlan(RECORDS, "uint8", (rows, record.record_bytes))
    step = max(1, COPY_BYTES // record.record_bytes)
    with SafetensorsWriter(path, [plan], alignment=TABLE_ALIGNMENT) as writer:
        parts = _extents(source, record)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            chunks = [
                read_exactly(Path(part.file), part.offset + start * part.row_bytes, count * part.row_bytes)
                for part in parts
            ]
            block = np.concatenate(
                [chunk.reshape(count, part.row_bytes) for chunk, part in zip(chunks, parts, strict=True)], axis=1
            )
            writer.write_rows(RECORDS, start, block)
            progress(block.nbytes)
        offset = writer.offsets[RECORDS]
    extent = Extent(file=f"{folder.name}/{path.name}", external=False, offset=offset, row_bytes=record.record_bytes)
    return _table_spec(source, keyer, record, [extent])


def reference_table(source: EngramSource, keyer: KeyerSpec) -> TableSpec:
    """Refer to the rows where they lie; nothing is written, and the checkpoint must stay where it is."""
    record = source.record_format()
    return _table_spec(source, keyer, record, _extents(source, record))


def write_token_map(source: EngramSource, vocab_size: int, tokenizer_json: bytes | None, folder: Path) -> KeyerSpec:
    """Write the token map, little-endian int32, where the site has one; return the site's keyer."""
    token_map = source.token_map(vocab_size, tokenizer_json)
    if token_map is None:
        return source.config.keyer
    path = folder / f"{source.config.site}.token_map.int32"
    path.write_bytes(token_map.astype("<i4").tobytes())
    return dataclasses.replace(source.config.keyer, token_map=f"{folder.name}/{path.name}")


def _extents(source: EngramSource, record: RecordFormat) -> list[Extent]:
    sizes = [record.payload_bytes, record.record_bytes - record.payload_bytes]
    extents = []
    for name, row_bytes in zip(source.table_parts(), sizes, strict=False):
        path, entry = source.tensors.locate(name)
        extents.append(
            Extent(
                file=str(path.resolve()),
                external=True,
                offset=entry.start,
                row_bytes=row_bytes,
                identity=file_identity(path),
            )
        )
    return extents


def _table_spec(source: EngramSource, keyer: KeyerSpec, record: RecordFormat, extents: Sequence[Extent]) -> TableSpec:
    return TableSpec(
        site=source.config.site,
        num_rows=source.config.num_rows,
        record=record,
        extents=tuple(extents),
        keyer=keyer,
    )
