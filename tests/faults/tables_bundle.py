"""Bundles of one table of random rows, without a graph, and how rows are read from them by every way there is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_export.host_table import TableSource
from engram_export.table_writer import sum_up, table_files, write_table_file
from engram_runtime.bundle import MANIFEST_NAME, Bundle, file_sha256, manifest_bytes
from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.manifest import FileEntry, Manifest, ModelInfo
from engram_runtime.records import RecordFormat
from engram_runtime.table_spec import TablePart, TableSpec
from engram_runtime.tables.checksums import read_checksums
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.opening import open_table
from engram_runtime.tables.options import MMAP, PREAD, RESIDENT
from engram_runtime.tables.record_file import can_lease

SITE, VOCAB, HEADS, ORDERS = "layer_0", 4096, 8, (1, 2)
RECORD = RecordFormat(payload="int8", columns=156, scale="float32", scale_columns=156)  # 160 bytes, as Qwen3.8's
BLOCK_ROWS = 1 << 16
IOS = (PREAD, MMAP, RESIDENT)

Gather = Callable[[NDArray[np.int64]], NDArray[np.float32]]  # row ids [N] to rows [N, columns]


def write_bundle(folder: Path, num_bytes: int, seed: int = 0) -> Bundle:
    """Write a bundle whose table has about so many bytes and 16 rows a token."""
    keyer = keyer_of(num_bytes // RECORD.record_bytes)
    (folder / "tables").mkdir(parents=True)
    num_rows = keyer.min_rows
    source = TableSource(site=SITE, keyer=keyer, token_map=None, num_rows=num_rows, record=RECORD, parts=())
    (file,) = table_files(source, RECORD, folder / "tables")
    blocks = (
        random_records(start, min(BLOCK_ROWS, num_rows - start), seed) for start in range(0, num_rows, BLOCK_ROWS)
    )
    write_table_file(file, blocks, lambda count: None)
    sum_up(file)
    part = TablePart(row_bytes=RECORD.record_bytes, ranges=(file.rows,))
    spec = TableSpec(site=SITE, num_rows=num_rows, record=RECORD, parts=(part,), keyer=keyer)
    entries = tuple(
        FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in (file.path, file.checksums)
    )
    manifest = Manifest(producer="tests/faults", model=model_info(), graphs={}, tables=(spec,), files=entries)
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    return Bundle.open(folder)


def keyer_of(rows: int) -> NgramKeyerSpec:
    """Return a keyer of tokens and pairs over about so many rows."""
    (primes,) = derive_primes(layers=1, rows_per_head=[rows // HEADS // len(ORDERS)] * len(ORDERS), num_heads=HEADS)
    multipliers = derive_multipliers(vocab_size=VOCAB, max_order=max(ORDERS), layer_id=0)
    return NgramKeyerSpec(
        orders=ORDERS,
        num_heads=HEADS,
        multipliers=tuple(multipliers.tolist()),
        primes=tuple(primes.tolist()),
        offsets=tuple(column_offsets(primes).tolist()),
        pad_id=0,
    )


def model_info() -> ModelInfo:
    """Return a model of nothing but a vocabulary."""
    return ModelInfo(
        name="table",
        family="table",
        quantisation="none",
        vocab_size=VOCAB,
        hidden_size=1,
        num_layers=1,
        context_length=1 << 20,
    )


def random_records(start: int, count: int, seed: int) -> NDArray[np.uint8]:
    """Return ``[count, 160]`` records whose scales are powers of two."""
    rng = np.random.default_rng([seed, start])
    records = rng.integers(0, 256, (count, RECORD.record_bytes), dtype=np.uint8)
    records[:, RECORD.payload_bytes :] = np.array([0.25], dtype="<f4").view(np.uint8)
    return records


def table_file(bundle: Bundle) -> Path:
    """Return the file of the table's rows."""
    return bundle.file(bundle.manifest.tables[0].ranges[0].file)


def true_rows(bundle: Bundle) -> NDArray[np.float32]:
    """Return ``[num_rows, columns]`` as numpy reads them from the file."""
    (spec,) = bundle.manifest.tables
    data = np.fromfile(table_file(bundle), dtype=np.uint8, offset=spec.ranges[0].offset)
    records = data.reshape(spec.num_rows, RECORD.record_bytes)
    scales = np.ascontiguousarray(records[:, RECORD.payload_bytes :]).view("<f4")
    rows: NDArray[np.float32] = records[:, : RECORD.payload_bytes].view(np.int8) * scales
    return rows


def mapping(bundle: Bundle) -> str:
    """Say whether tables that are to be mapped are mapped here, see `open_rows`."""
    return "mapped under a lease" if can_lease(table_file(bundle)) else "no leases here: what is to be mapped is read"


def open_rows(bundle: Bundle, io: str) -> tuple[Gather, Callable[[], None]]:
    """Open a table; returns what gives rows and what closes it.

    Without a lease a table that is to be mapped is read, as the runtime's policy has it.
    """
    (spec,) = bundle.manifest.tables
    table = open_table(bundle, spec, PREAD if io == MMAP and not can_lease(table_file(bundle)) else io)

    def gather(row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        out = np.empty((len(row_ids), RECORD.columns), dtype=np.float32)
        table.gather(row_ids, out)
        return out

    return gather, table.close


def open_records(bundle: Bundle) -> FileTable:
    """Open a table as commands that read all of it do."""
    (spec,) = bundle.manifest.tables
    return FileTable(spec, bundle.table_path, checksums=read_checksums(bundle, spec))
