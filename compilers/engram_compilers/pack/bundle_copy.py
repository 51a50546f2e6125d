"""A copy of a bundle for a box: what a compiled library runs with, and no more."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engram_runtime.bundle import MANIFEST_NAME, Bundle, file_sha256, manifest_bytes
from engram_runtime.library import LIBRARY_FOLDER, LIBRARY_INFO_NAME, LibraryInfo
from engram_runtime.manifest import FileEntry, Manifest
from engram_runtime.new_folder import make_read_only
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.checksums import write_checksums

COPY_BLOCK_BYTES = 1 << 22


def copy_bundle(bundle: Bundle, library: Path, info: LibraryInfo, out: Path, *, with_graph: bool) -> Manifest:
    """Write a bundle with one compiled library to ``out``, and return its manifest, which lists what is there.

    Files are hard links where the file system has them, as none is ever changed in place. Rows that lie outside the
    bundle are copied into it.

    Args:
        library: folder of the library. ``info``: its description.
        with_graph: take the graphs and their weights along, which a compiled library does without.

    Raises:
        TableError: rows outside the bundle are gone or are others by now.
    """
    manifest = bundle.manifest
    omitted = frozenset() if with_graph else manifest.graph_files
    kept = [entry for entry in manifest.files if entry.path not in omitted]
    for entry in kept:
        link_or_copy(bundle.file(entry.path), out / entry.path)
    tables, copied = _copy_external_rows(bundle, out)
    packed = dataclasses.replace(
        manifest,
        tables=tables,
        files=(*kept, *copied),
        omitted=tuple(entry for entry in (*manifest.files, *manifest.omitted) if entry.path in omitted),
    )
    packed.check()
    (out / MANIFEST_NAME).write_bytes(manifest_bytes(packed))
    for name in (LIBRARY_INFO_NAME, *info.files.values()):
        link_or_copy(library / name, out / LIBRARY_FOLDER / info.target / name)
    make_read_only(out)
    return packed


def machine_code(info: LibraryInfo) -> list[str]:
    """Return the names of the files of a library that are code."""
    return [name for part, name in info.files.items() if part in ("library", "runtime")]


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system can't."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # a second name of a symbolic link would lead nowhere on the box
    except OSError:
        shutil.copyfile(source, target)


def external_bytes(manifest: Manifest) -> int:
    """Return the size of the rows that lie outside a bundle."""
    parts = [part for table in manifest.tables for part in table.parts]
    return sum(rows.num_rows * part.row_bytes for part in parts for rows in part.ranges if rows.external)


def _copy_external_rows(bundle: Bundle, out: Path) -> tuple[tuple[TableSpec, ...], list[FileEntry]]:
    """Copy rows from outside the bundle; returns all tables as they are then, and the files that were written."""
    names = _unused_names({entry.path for entry in bundle.manifest.files})
    written: list[FileEntry] = []

    def inside(rows: RowRange, row_bytes: int) -> RowRange:
        if not rows.external:
            return rows
        name = next(names)
        written.append(_copy_rows(bundle.table_path(rows), rows.offset, rows.num_rows * row_bytes, out, name))
        written.append(checksums := _sum_up(out, name))
        return dataclasses.replace(rows, file=name, external=False, offset=0, identity=None, checksums=checksums.path)

    def copied(part: TablePart) -> TablePart:
        return dataclasses.replace(part, ranges=tuple(inside(rows, part.row_bytes) for rows in part.ranges))

    tables = (dataclasses.replace(table, parts=tuple(map(copied, table.parts))) for table in bundle.manifest.tables)
    return tuple(tables), written


def _unused_names(taken: set[str]) -> Iterator[str]:
    names = (f"tables/rows-{number:05}.bin" for number in range(1, 1 << 20))
    return (name for name in names if name not in taken)


def _sum_up(out: Path, name: str) -> FileEntry:
    """Write the checksums of a file."""
    path = out / f"{name}.crc32"
    write_checksums(out / name, path)
    return FileEntry(path=f"{name}.crc32", bytes=path.stat().st_size, sha256=file_sha256(path))


def _copy_rows(source: Path, offset: int, size: int, out: Path, name: str) -> FileEntry:
    """Copy ``size`` bytes of a file from ``offset`` on."""
    digest, left = hashlib.sha256(), size
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, target.open("wb") as copy:
        file.seek(offset)
        while block := file.read(min(left, COPY_BLOCK_BYTES)):
            digest.update(block)
            copy.write(block)
            left -= len(block)
    return FileEntry(path=name, bytes=size - left, sha256=digest.hexdigest())
