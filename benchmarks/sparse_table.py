"""Makes a bundle of one table in a sparse file: for `engram tables trace` and `mrc` at sizes no disk here holds.

    python benchmarks/sparse_table.py build/demo.engram build/sparse.engram --rows 320000000

The keyer is that of Qwen3.8 (2-grams and 3-grams, 8 heads each) over the tokenizer of another bundle; rows are zeros.
"""

import argparse
import os
import shutil
from pathlib import Path

from engram_runtime.bundle import MANIFEST_NAME, Bundle, file_identity, file_sha256, manifest_bytes
from engram_runtime.hashing import column_offsets, derive_primes, derive_splitmix_multipliers
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.manifest import FileEntry, Manifest
from engram_runtime.records import RecordFormat
from engram_runtime.table_spec import RowRange, TablePart, TableSpec

ORDERS, HEADS = (2, 3), 8
RECORD = RecordFormat(payload="int8", columns=156, scale="float32", scale_columns=156)  # 160 bytes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def main() -> None:
    """Write the sparse file beside the bundle, and the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="bundle whose tokenizer is taken")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=320_000_000)
    arguments = parser.parse_args()
    source = Bundle.open(arguments.source)
    arguments.out.mkdir(parents=True)
    keyer = qwen_keyer(source.manifest.model.vocab_size, arguments.rows)
    table = sparse_table(keyer, arguments.out.with_suffix(".rows").resolve())
    manifest = Manifest(
        producer="benchmarks/sparse_table.py",
        model=source.manifest.model,
        graphs={},
        tables=(table,),
        files=tuple(copy_file(source.file(name), arguments.out) for name in TOKENIZER_FILES),
    )
    (arguments.out / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    print(f"{arguments.out}: {table.num_rows:,} rows of {RECORD.record_bytes} bytes in {table.ranges[0].file}")


def qwen_keyer(vocab_size: int, rows: int) -> NgramKeyerSpec:
    """Return a keyer over about so many rows."""
    per_head = rows // (HEADS * len(ORDERS))
    (primes,) = derive_primes(layers=1, rows_per_head=[per_head] * len(ORDERS), num_heads=HEADS)
    multipliers = derive_splitmix_multipliers(vocab_size=vocab_size, max_order=max(ORDERS), layer_index=0)
    return NgramKeyerSpec(
        orders=ORDERS,
        num_heads=HEADS,
        multipliers=tuple(multipliers.tolist()),
        primes=tuple(primes.tolist()),
        offsets=tuple(column_offsets(primes).tolist()),
        pad_id=0,
    )


def sparse_table(keyer: NgramKeyerSpec, path: Path) -> TableSpec:
    """Describe a table in a file that is made as long as its rows, and takes no room on the disk."""
    num_rows = keyer.min_rows
    path.touch()
    os.truncate(path, num_rows * RECORD.record_bytes)
    rows = RowRange(
        first_row=0, num_rows=num_rows, file=str(path), external=True, offset=0, identity=file_identity(path)
    )
    part = TablePart(row_bytes=RECORD.record_bytes, ranges=(rows,))
    return TableSpec(site="layer_1", num_rows=num_rows, record=RECORD, parts=(part,), keyer=keyer)


def copy_file(path: Path, folder: Path) -> FileEntry:
    """Copy a file into a bundle and describe it."""
    copy = folder / path.name
    shutil.copyfile(path, copy)
    return FileEntry(path=path.name, bytes=copy.stat().st_size, sha256=file_sha256(copy))


if __name__ == "__main__":
    main()
