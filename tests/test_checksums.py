"""Tables are held against the checksums of their blocks: what isn't as it was written is an error, in every store."""

import dataclasses
import errno
import itertools
import json
import os
import resource
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.small_tables import as_ids, joined_spec, row_format, sharded_spec, split_spec, table_spec, write_part
from tests.test_bundle import MAP, TABLE, contents, manifest_json, message, row_range, write_bundle
from tests.test_table_stores import ON_DISK, OPEN, decoder
from tests.workshop import Workshop, copy_folder

from engram_runtime.bundle import Bundle, sealed
from engram_runtime.errors import BundleError, TableError
from engram_runtime.table_spec import TablePart, TableSpec
from engram_runtime.tables.checksums import Checksums, write_checksums
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.mapped import MappedTable
from engram_runtime.tables.opening import open_table
from engram_runtime.tables.options import PREAD
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.store import TableStore

BLOCK = 4096
COLUMNS, ROWS = 160, 100  # three blocks and a part of a fourth; some rows lie in two
WIDE = 3 * BLOCK
RECORD = row_format("int8", "none", columns=COLUMNS)


def rows_spec(folder: Path, columns: int = COLUMNS, rows: int = ROWS) -> TableSpec:
    values = np.random.default_rng(5).integers(0, 256, (rows, columns), dtype=np.uint8)
    return table_spec(row_format("int8", "none", columns=columns), [write_part(folder / "rows.bin", values)], rows)


def true_checksums(path: Path) -> NDArray[np.uint32]:
    data = path.read_bytes()
    return np.array([zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)], dtype=np.uint32)


def checksums_of(folder: Path, spec: TableSpec) -> Checksums:
    return {rows.file: true_checksums(folder / rows.file) for rows in spec.ranges}


def opened(open_store: Callable[..., TableStore], folder: Path, spec: TableSpec, checksums: Checksums) -> TableStore:
    return open_store(spec, lambda rows: folder / rows.file, decoder(spec), checksums=checksums)


def gathered(table: TableStore, row_ids: Sequence[int], columns: int) -> NDArray[np.float32]:
    out = np.empty((len(row_ids), columns), dtype=np.float32)
    table.gather(as_ids(list(row_ids)), out)
    return out


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Flip a bit of a file where it is."""
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def damage(path: Path, block: int, expected: NDArray[np.uint32]) -> str:
    """Return the error of a damaged block."""
    return (
        f"table file {path} is damaged: block {block}, 4096 bytes from byte {block * BLOCK} on, has CRC-32 "
        f"{true_checksums(path)[block]:08x}, not {expected[block]:08x}; copy the file anew or export the bundle again"
    )


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_checksums_are_those_of_zlib_block_by_block(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(os.urandom(size))
    write_checksums(tmp_path / "a", tmp_path / "a.crc32")
    assert (tmp_path / "a.crc32").read_bytes() == true_checksums(tmp_path / "a").astype("<u4").tobytes()


@pytest.mark.parametrize("make", [joined_spec, split_spec, sharded_spec, rows_spec])
@pytest.mark.parametrize("open_store", OPEN)
def test_checked_rows_are_the_rows(
    tmp_path: Path, open_store: Callable[..., TableStore], make: Callable[[Path], TableSpec]
) -> None:
    spec = make(tmp_path)
    every, columns = [*range(spec.num_rows), 3, 3, 0], spec.record.columns
    plain = gathered(opened(open_store, tmp_path, spec, {}), every, columns)
    table = opened(open_store, tmp_path, spec, checksums_of(tmp_path, spec))
    for _ in range(2):  # first with checks, then without
        np.testing.assert_array_equal(gathered(table, every, columns), plain, strict=True)
        np.testing.assert_array_equal(gathered(table, every[::-7], columns), plain[::-7], strict=True)


@pytest.mark.parametrize("columns", [COLUMNS, WIDE])
@pytest.mark.parametrize("open_store", ON_DISK)
def test_rows_of_a_damaged_block_are_an_error_and_others_are_given(
    tmp_path: Path, open_store: Callable[..., TableStore], columns: int
) -> None:
    spec, path = rows_spec(tmp_path, columns), tmp_path / "rows.bin"
    checksums = checksums_of(tmp_path, spec)
    sound = opened(open_store, tmp_path, spec, {})
    true = gathered(sound, range(ROWS), columns)
    sound.close()  # the lease of a map would have the flip wait
    byte = 2 * BLOCK + 100
    flip(path, byte)
    table = opened(open_store, tmp_path, spec, checksums)
    touching = [row for row in range(ROWS) if 100 + row * columns < 3 * BLOCK and 100 + (row + 1) * columns > 2 * BLOCK]
    for row_ids in ([touching[0]], [touching[-1]], [0, touching[0], 99], [touching[0]], range(ROWS)):
        with pytest.raises(TableError) as caught:
            gathered(table, row_ids, columns)
        assert str(caught.value) == damage(path, 2, checksums["rows.bin"])
    others = [row for row in range(ROWS) if row not in touching]
    np.testing.assert_array_equal(gathered(table, others, columns), true[others], strict=True)
    table.close()
    flip(path, byte)
    mended = opened(open_store, tmp_path, spec, checksums)
    np.testing.assert_array_equal(gathered(mended, range(ROWS), columns), true, strict=True)
    assert len(touching) == (27 if columns == COLUMNS else 1)


@pytest.mark.parametrize("byte", [0, 3 * BLOCK - 1, 100 + ROWS * COLUMNS - 1])
def test_a_table_that_is_loaded_is_checked_as_a_whole(tmp_path: Path, byte: int) -> None:
    spec, path = rows_spec(tmp_path), tmp_path / "rows.bin"
    checksums = checksums_of(tmp_path, spec)
    flip(path, byte, bit=7)
    with pytest.raises(TableError) as caught:
        opened(OPEN[0], tmp_path, spec, checksums)
    assert str(caught.value) == damage(path, byte // BLOCK, checksums["rows.bin"])


def test_records_read_one_after_another_are_checked(tmp_path: Path) -> None:
    spec, path = rows_spec(tmp_path), tmp_path / "rows.bin"
    checksums = checksums_of(tmp_path, spec)
    whole = np.fromfile(path, dtype=np.uint8)[100:].reshape(ROWS, COLUMNS)
    flip(path, 13_000)
    with FileTable(spec, lambda rows: tmp_path / rows.file, checksums=checksums) as table:
        np.testing.assert_array_equal(table.read_rows(3, 70), whole[3:73], strict=True)
        with pytest.raises(TableError) as caught:
            table.read_all()
    assert str(caught.value) == damage(path, 3, checksums["rows.bin"])


class CountedReads:
    """Reads as `os.preadv` does and keeps what was read; nothing is in memory for those who won't wait."""

    def __init__(self) -> None:
        self.waited: list[tuple[int, int]] = []

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        if flags:
            raise BlockingIOError(errno.EAGAIN, "nothing is in memory")
        self.waited.append((offset, len(buffers[0])))
        return os.preadv(descriptor, [buffers[0][:1000]], offset)


def test_rows_of_a_block_are_read_with_it_once(tmp_path: Path) -> None:
    spec, reads = rows_spec(tmp_path), CountedReads()
    table = PreadTable.open(
        spec,
        lambda rows: tmp_path / rows.file,
        decoder(spec),
        checksums=checksums_of(tmp_path, spec),
        read=reads,
    )
    gathered(table, [0, 1, 20, 21], COLUMNS)
    assert {(offset // BLOCK, offset + length) for offset, length in reads.waited} == {(0, BLOCK)}
    reads.waited.clear()
    gathered(table, [0], COLUMNS)  # was seen, but is no longer in memory: what comes from the disk is checked again
    assert reads.waited[0] == (0, BLOCK)


def test_a_mapped_row_that_was_forgotten_is_checked_again(tmp_path: Path) -> None:
    spec = rows_spec(tmp_path, columns=16 * BLOCK, rows=4)
    checksums = checksums_of(tmp_path, spec)
    table = opened(MappedTable, tmp_path, spec, checksums)
    gathered(table, [1], 16 * BLOCK)
    table._files.end_leases()  # type: ignore[attr-defined]
    flip(tmp_path / "rows.bin", 20 * BLOCK)
    gathered(table, [1], 16 * BLOCK)  # a page that is known isn't checked
    table._residency.forget()  # type: ignore[attr-defined]
    with pytest.raises(TableError) as caught:
        gathered(table, [1], 16 * BLOCK)
    assert str(caught.value) == damage(tmp_path / "rows.bin", 20, checksums["rows.bin"])


def test_pages_that_came_back_from_the_disk_are_checked_before_their_rows_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = rows_spec(tmp_path)
    checksums = checksums_of(tmp_path, spec)
    table = opened(MappedTable, tmp_path, spec, checksums)
    true = gathered(table, [0, 60], COLUMNS)  # known from now on
    table._files.end_leases()  # type: ignore[attr-defined]
    flip(tmp_path / "rows.bin", 2 * BLOCK)
    np.testing.assert_array_equal(gathered(table, [60], COLUMNS), true[1:], strict=True)
    faults = itertools.count()
    monkeypatch.setattr(resource, "getrusage", lambda whose: SimpleNamespace(ru_majflt=next(faults)))
    with pytest.raises(TableError) as caught:
        gathered(table, [60], COLUMNS)
    assert str(caught.value) == damage(tmp_path / "rows.bin", 2, checksums["rows.bin"])
    np.testing.assert_array_equal(gathered(table, [0], COLUMNS), true[:1], strict=True)


def test_an_exported_table_has_checksums_of_every_file(workshop: Workshop) -> None:
    bundle = workshop.uncompiled()
    (spec,) = bundle.manifest.tables
    (rows,) = spec.ranges
    assert rows.checksums == rows.file.replace(".safetensors", ".crc32")
    found = np.frombuffer(bundle.read_checked(rows.checksums), dtype="<u4")
    np.testing.assert_array_equal(found, true_checksums(bundle.file(rows.file)))


def test_damaged_checksums_are_an_error_when_the_table_is_opened(workshop: Workshop, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(workshop.uncompiled().path, tmp_path / "b"))
    (spec,) = bundle.manifest.tables
    name = spec.ranges[0].checksums
    assert name is not None
    flip(bundle.file(name), 5)
    with pytest.raises(BundleError) as caught:
        open_table(bundle, spec, PREAD)
    assert str(caught.value).startswith(f"{name} has SHA-256 ")


def test_a_damaged_token_map_is_an_error(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "b"))
    flip(bundle.file(MAP), 0)
    with pytest.raises(BundleError, match=f"^{MAP} has SHA-256 "):
        bundle.keyer(bundle.manifest.tables[0].keyer)


def with_checksums(folder: Path, data: bytes, **changes: object) -> Path:
    """Write a bundle whose table has checksums."""
    files = contents() | {"tables/sums": data}
    raw = manifest_json(files)
    raw["tables"][0]["parts"][0]["ranges"] = [row_range(checksums="tables/sums", **changes)]
    write_bundle(folder)
    (folder / "tables/sums").write_bytes(data)
    (folder / "engram.json").write_bytes(sealed(raw))
    return folder


def test_checksums_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = with_checksums(tmp_path / "b", bytes(8))
    expected = f"checksums tables/sums hold 8 bytes, those of {TABLE} take 4"
    assert message(folder) == f"{folder / 'engram.json'}: {expected}"


def test_checksums_of_external_files_are_refused(tmp_path: Path) -> None:
    folder = with_checksums(tmp_path / "b", bytes(4), file="/rows", external=True, identity="0")
    expected = "table file /rows is external and must have no checksums"
    assert message(folder) == f"{folder / 'engram.json'}: {expected}"


def test_two_checksums_of_one_file_are_refused(tmp_path: Path) -> None:
    spec = joined_spec(tmp_path)
    (rows,) = spec.ranges
    twice = TablePart(row_bytes=2, ranges=(dataclasses.replace(rows, checksums="b"),))
    wrong = dataclasses.replace(spec, parts=(TablePart(row_bytes=6, ranges=spec.ranges), twice))
    with pytest.raises(BundleError) as caught:
        wrong.check()
    assert str(caught.value) == "table file records.bin has checksums b and None"


def test_a_bundle_of_version_2_opens_without_seal_and_checksums(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    old = manifest_json(contents()) | {"format_version": 2}
    (folder / "engram.json").write_text(json.dumps(old))
    assert Bundle.open(folder).manifest.tables[0].ranges[0].checksums is None
    (folder / "engram.json").write_text(json.dumps(old | {"sha256": "0" * 64}))
    assert message(folder).endswith("manifest has unknown keys ['sha256']; it may need a newer engram-edge")


def test_a_seal_is_the_digest_of_the_file_around_it(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b") / "engram.json"
    data = path.read_bytes()
    assert data == sealed(json.loads(data))
    path.write_bytes(data.replace(b"engram-edge 0.1.0", b"engram-edge 0.1.1"))
    found = message(tmp_path / "b")
    assert found.startswith(f"{path}: the manifest has SHA-256 ")
    assert found.endswith(f", it says {json.loads(data)['sha256']}: it was damaged or changed; export again")


@pytest.mark.parametrize("seal", [None, 1, "", "0" * 63, "A" * 64])
def test_what_is_no_seal_is_refused(tmp_path: Path, seal: object) -> None:
    path = write_bundle(tmp_path / "b") / "engram.json"
    path.write_text(json.dumps(manifest_json(contents()) | {"sha256": seal}))
    expected = f"manifest.sha256 is {seal!r}, expected 64 hexadecimal digits; export again"
    if seal == "A" * 64 or seal == "0" * 63:
        assert message(tmp_path / "b").endswith("expected 64 hexadecimal digits; export again")
    else:
        assert message(tmp_path / "b") == f"{path}: {expected}"


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b") / "engram.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 131):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        message(tmp_path / "b")
