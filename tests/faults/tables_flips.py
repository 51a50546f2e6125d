"""C4: single bits of a bundle's files that are another than were written, as disks and copies make them."""

import os
import random
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.faults.row import Outcome, Row
from tests.faults.tables_bundle import (
    IOS,
    RECORD,
    mapping,
    open_records,
    open_rows,
    table_file,
    true_rows,
    write_bundle,
)
from tests.faults.tables_changed import read_once

from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, TableError
from engram_runtime.table_spec import CHECKSUM_BLOCK_BYTES
from engram_runtime.tables.options import RESIDENT

TABLE_BYTES = 320_000
RECORDS = "records"  # read one after another
WAYS = (*IOS, RECORDS)


def exported(folder: Path) -> Path:
    """Export a tiny model with a table, all kinds of files included."""
    from tests.tiny import TinyModel, TinySite, add_sites, save_checkpoint
    from tests.workshop import export

    checkpoint = add_sites(save_checkpoint(folder / "checkpoint", TinyModel()), TinySite())
    export(checkpoint, folder / "bundle", quant="int8")
    return folder / "bundle"


def found_by_verify(count: int) -> Outcome:
    """Flip a bit of a file, all files alike often, and open and hash the bundle as `engram verify` does first."""
    rng, failures = random.Random("C4 verify"), []
    with tempfile.TemporaryDirectory() as folder:
        bundle = exported(Path(folder))
        paths = sorted(path for path in bundle.rglob("*") if path.is_file())
        for _ in range(count):
            path = rng.choice(paths)
            bit = rng.randrange(8 * path.stat().st_size)
            flip(path, bit)
            if not is_refused(bundle):
                failures.append(f"bit {bit} of {path.relative_to(bundle)}")
            flip(path, bit)
        if is_refused(bundle):
            failures.append("the bundle as it was")
    figure = f"{len(paths)} files, engram.json among them"
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:8]))


def is_refused(folder: Path) -> bool:
    """Whether a bundle doesn't open or its digests are wrong."""
    try:
        Bundle.open(folder).verify_digests()
    except BundleError:
        return True
    return False


def flip(path: Path, bit: int) -> None:
    """Flip a bit of a file where it is, whether or not its mode lets others write."""
    path.chmod(0o644)
    file = os.open(path, os.O_RDWR)
    try:
        (value,) = os.pread(file, 1, bit // 8)
        os.pwrite(file, bytes([value ^ 1 << bit % 8]), bit // 8)
    finally:
        os.close(file)


def found_by_reads(count: int) -> Outcome:
    """Flip a bit among the records and read a row that touches its block, and others, by each way in turn."""
    rng, failures = random.Random("C4 reads"), []
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", TABLE_BYTES)
        rows, path, (spec,) = true_rows(bundle), table_file(bundle), bundle.manifest.tables
        first = 8 * spec.ranges[0].offset
        for number in range(count):
            bit, way = rng.randrange(first, 8 * path.stat().st_size), WAYS[number % len(WAYS)]
            flip(path, bit)
            wrong = found_by_a_read(bundle, rows, bit // 8, way, rng)
            flip(path, bit)
            if wrong:
                failures.append(f"bit {bit}, {way}: {wrong}")
        figure = mapping(bundle)
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:8]))


def found_by_a_read(bundle: Bundle, rows: NDArray[np.float32], byte: int, way: str, rng: random.Random) -> str:
    """Return what was wrong, if rows that touch a damaged block are given or others aren't."""
    (spec,) = bundle.manifest.tables
    begin = byte // CHECKSUM_BLOCK_BYTES * CHECKSUM_BLOCK_BYTES - spec.ranges[0].offset
    touching = range(
        max(begin // RECORD.record_bytes, 0),
        min(-(-(begin + CHECKSUM_BLOCK_BYTES) // RECORD.record_bytes), spec.num_rows),
    )
    if way in (RESIDENT, RECORDS):
        return "" if whole_is_refused(bundle, way) else "all of it was read"
    gather, close = open_rows(bundle, way)
    other = rng.randrange(spec.num_rows)
    expected = "error" if other in touching else ""
    first, second = (read_once(rows, gather, np.array([row])) for row in (other, rng.choice(touching)))
    close()
    return "" if (first, second) == (expected, "error") else f"rows gave {first!r}, {second!r}"


def whole_is_refused(bundle: Bundle, way: str) -> bool:
    """Whether reading a whole table is a TableError."""
    try:
        if way == RESIDENT:
            open_rows(bundle, RESIDENT)
        else:
            with open_records(bundle) as table:
                table.read_all()
    except TableError:
        return True
    return False


ROWS = (
    Row(
        name="C4 verify",
        fault="one bit flipped in any file of an exported bundle",
        expected="the bundle is refused when it is opened or verified",
        quick=10_000,
        full=200_000,
        run=found_by_verify,
    ),
    Row(
        name="C4 reads",
        fault="one bit flipped among a table's rows, then rows read (pread, mmap, resident, one after another)",
        expected="TableError from every row that touches the block, others bit-identical",
        quick=10_000,
        full=200_000,
        run=found_by_reads,
    ),
)
