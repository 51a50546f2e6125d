"""Tables larger than memory, of random rows: bundles without a decoder, and an Engram site for SmolLM2-135M.

    python benchmarks/big_table.py build/int8.engram --gib 6                           # Qwen3.8's shape
    python benchmarks/big_table.py build/fp8.engram --gib 6 --record 264 --columns 48  # DeepSeek-V4.1's shape
    python benchmarks/big_table.py build/site --gib 6 --smollm2
    engram-export SMOLLM2.gguf -o build/big.engram --engram build/site --tables reference

`--sparse` writes holes, which take no disk and read as zeros; such a table lies beside its bundle, so that nothing of
it is hashed.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from engram_export.host_table import TableSource
from engram_export.pipeline import producer
from engram_export.table_writer import RECORDS, sum_up, table_files, write_table_file
from engram_export.weights_file import TABLE_ALIGNMENT, SafetensorsWriter
from engram_runtime.bundle import MANIFEST_NAME, Bundle, file_identity, file_sha256, manifest_bytes
from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.manifest import FileEntry, Manifest, ModelInfo
from engram_runtime.records import NO_FACTOR, RecordFormat
from engram_runtime.safetensors_layout import TensorPlan
from engram_runtime.table_spec import RowRange, TablePart, TableSpec

SITE, TABLES_FOLDER, SEED = "layer_0", "tables", 0
VOCAB, CONTEXT = 151_936, 1 << 20
BLOCK_ROWS = 1 << 18
PAD_ID = 2

INT8 = RecordFormat(payload="int8", columns=160, scale="none", scale_columns=160, factor=(1 / 64).hex())
FP8 = RecordFormat(payload="float8_e4m3", columns=256, scale="e8m0", scale_columns=32, factor=NO_FACTOR)
RECORDS_BY_BYTES = {record.record_bytes: record for record in (INT8, FP8)}
ORDERS_BY_COLUMNS = {16: (2, 3), 48: (2, 3, 4)}

SMOLLM2_HIDDEN, SMOLLM2_VOCAB, SMOLLM2_LAYER = 576, 49_152, 25
VALUE_SIZE = 0.02  # of what the site adds, against a residual stream of about one: text stays text
ROW_SIZE = 127 / 3**0.5  # root mean square of random int8 values

Blocks = Iterator[NDArray[np.uint8]]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BigTable:
    """A table of a given size, and the hash that leads to its rows."""

    record: RecordFormat
    keyer: NgramKeyerSpec

    @property
    def num_rows(self) -> int:
        """Rows, all of which some history leads to."""
        return self.keyer.min_rows

    def spec(self, ranges: tuple[RowRange, ...]) -> TableSpec:
        """Return what a manifest says of it."""
        part = TablePart(row_bytes=self.record.record_bytes, ranges=ranges)
        return TableSpec(site=SITE, num_rows=self.num_rows, record=self.record, parts=(part,), keyer=self.keyer)

    def blocks(self, start: int, stop: int) -> Blocks:
        """Yield random records of rows ``start`` to ``stop``; none of their values is NaN."""
        rng = np.random.default_rng([SEED, start])
        while start < stop:
            count = min(BLOCK_ROWS, stop - start)
            yield random_records(rng, count, self.record)
            start += count


def big_table(size_bytes: int, record: RecordFormat, columns: int, *, vocab_size: int = VOCAB) -> BigTable:
    """Return a table of at least ``size_bytes`` with ``columns`` rows a token."""
    orders = ORDERS_BY_COLUMNS[columns]
    heads = columns // len(orders)
    each = -(-size_bytes // record.record_bytes // columns)
    (primes,) = derive_primes(layers=1, rows_per_head=[each] * len(orders), num_heads=heads)
    multipliers = derive_multipliers(vocab_size=vocab_size, max_order=max(orders), layer_id=0)
    keyer = NgramKeyerSpec(
        orders=orders,
        num_heads=heads,
        multipliers=tuple(multipliers.tolist()),
        primes=tuple(primes.tolist()),
        offsets=tuple(column_offsets(primes).tolist()),
        pad_id=PAD_ID,
    )
    return BigTable(record=record, keyer=keyer)


def random_records(rng: np.random.Generator, count: int, record: RecordFormat) -> NDArray[np.uint8]:
    """Return ``[count, record_bytes]``: payloads of any bits but NaN, e8m0 scales around one."""
    records = np.frombuffer(bytearray(rng.bytes(count * record.record_bytes)), dtype=np.uint8)
    records = records.reshape(count, record.record_bytes)
    payload, scales = records[:, : record.payload_bytes], records[:, record.payload_bytes :]
    if record.payload == "float8_e4m3":
        payload -= (payload & 127) == 127  # all lower bits set is NaN
    if record.scale == "e8m0":
        scales[...] = 120 + scales % 8
    return records


def write_bundle(folder: Path, table: BigTable, progress: Progress) -> Bundle:
    """Write a bundle with the table inside, digests and all."""
    (folder / TABLES_FOLDER).mkdir(parents=True)
    source = TableSource(
        site=SITE, keyer=table.keyer, token_map=None, num_rows=table.num_rows, record=table.record, parts=()
    )
    files = table_files(source, table.record, folder / TABLES_FOLDER)
    for file in files:
        write_table_file(file, table.blocks(file.first_row, file.first_row + file.num_rows), progress)
        sum_up(file)
    paths = [path for file in files for path in (file.path, file.checksums)]
    return write_manifest(folder, table.spec(tuple(file.rows for file in files)), paths)


def write_sparse_bundle(folder: Path, table: BigTable) -> Bundle:
    """Write a bundle that refers to a file of holes beside it."""
    folder.mkdir(parents=True)
    path = folder.resolve().with_suffix(".holes.safetensors")
    plan = TensorPlan(RECORDS, "uint8", (table.num_rows, table.record.record_bytes))
    with SafetensorsWriter(path, [plan], alignment=TABLE_ALIGNMENT) as writer:
        writer.write_rows(RECORDS, table.num_rows - 1, np.zeros((1, table.record.record_bytes), dtype=np.uint8))
        offset = writer.offsets[RECORDS]
    return write_manifest(folder, table.spec((external_rows(path, offset, table.num_rows),)), [])


def external_rows(path: Path, offset: int, num_rows: int) -> RowRange:
    """Refer to rows in a file outside the bundle."""
    return RowRange(
        first_row=0, num_rows=num_rows, file=str(path), external=True, offset=offset, identity=file_identity(path)
    )


def write_manifest(folder: Path, table: TableSpec, files: list[Path]) -> Bundle:
    """Describe the bundle and open it."""
    model = ModelInfo(
        name=folder.name,
        family="table",
        quantisation="none",
        vocab_size=VOCAB,
        hidden_size=1,
        num_layers=1,
        context_length=CONTEXT,
    )
    entries = tuple(
        FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in files
    )
    manifest = Manifest(producer=producer(), model=model, graphs={}, tables=(table,), files=entries)
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    return Bundle.open(folder)


def write_site(folder: Path, table: BigTable, progress: Progress) -> None:
    """Write a folder for ``--engram``: the table and random small projections for SmolLM2-135M."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"engram": site_config(table)}), encoding="utf-8")
    width = table.keyer.columns * table.record.columns
    rows = TensorPlan("engram.table.rows", "int8", (table.num_rows, table.record.columns))
    projections = {f"engram.{name}_proj.weight": size for name, size in (("key", 1.0), ("value", VALUE_SIZE))}
    plans = [rows, *(TensorPlan(name, "float32", (SMOLLM2_HIDDEN, width)) for name in projections)]
    rng, start = np.random.default_rng(SEED), 0
    with SafetensorsWriter(folder / "engram.safetensors", plans, alignment=TABLE_ALIGNMENT) as writer:
        for name, size in projections.items():
            weights = rng.standard_normal((SMOLLM2_HIDDEN, width), dtype=np.float32)
            writer.write(name, weights * np.float32(size / ROW_SIZE / width**0.5))
        for block in table.blocks(0, table.num_rows):
            writer.write_rows(rows.name, start, block.view(np.int8))
            start += len(block)
            progress(block.nbytes)


def site_config(table: BigTable) -> dict[str, Any]:
    """Return the site as data."""
    keyer = table.keyer
    return {
        "layer_ids": [SMOLLM2_LAYER],
        "ngram_orders": keyer.orders,
        "num_hash_heads": keyer.num_heads,
        "row_dim": table.record.columns,
        "num_rows": table.num_rows,
        "hash": {
            "kind": keyer.kind,
            "multipliers": keyer.multipliers,
            "primes": keyer.primes,
            "offsets": keyer.offsets,
            "pad_id": keyer.pad_id,
        },
        "gate": {"query_norm_eps": 1e-5, "key_norm_eps": 1e-6, "signed_root_floor": 1e-6},
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--gib", type=float, default=6.0, show_default=True, help="Least size of the table.")
@click.option("--record", type=click.Choice(sorted(RECORDS_BY_BYTES)), default=160, show_default=True)
@click.option("--columns", type=click.Choice(sorted(ORDERS_BY_COLUMNS)), default=16, show_default=True)
@click.option("--sparse", is_flag=True, help="Write holes.")
@click.option("--smollm2", is_flag=True, help="Write a site for SmolLM2-135M instead of a bundle.")
def main(folder: Path, gib: float, record: int, columns: int, sparse: bool, smollm2: bool) -> None:
    """Make FOLDER."""
    if smollm2 and (sparse or RECORDS_BY_BYTES[record] is not INT8):
        raise click.UsageError("a site for SmolLM2 has random rows of int8: leave out --sparse and --record")
    vocab_size = SMOLLM2_VOCAB if smollm2 else VOCAB
    table = big_table(int(gib * 2**30), RECORDS_BY_BYTES[record], columns, vocab_size=vocab_size)
    size = table.num_rows * table.record.record_bytes
    if sparse:
        write_sparse_bundle(folder, table)
        return
    with click.progressbar(length=size, label=f"{size / 2**30:.2f} GiB") as bar:
        if smollm2:
            write_site(folder, table, bar.update)
        else:
            write_bundle(folder, table, bar.update)


if __name__ == "__main__":
    main()
