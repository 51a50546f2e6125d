"""How a bundle's tables are opened."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from engram_runtime.bundle import Bundle
from engram_runtime.memory import free_memory
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.checksums import Checksums, read_checksums
from engram_runtime.tables.decoding import NumpyRowDecoder, RowDecoder
from engram_runtime.tables.disk import disk_facts
from engram_runtime.tables.mapped import MappedTable
from engram_runtime.tables.memory import Progress, ResidentTable, no_progress
from engram_runtime.tables.options import MMAP, PREAD, RESIDENT, UNREAD, TableOptions
from engram_runtime.tables.place import place_of
from engram_runtime.tables.policy import Room, TableChoice, TableFacts, choose, table_room
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.record_file import can_lease
from engram_runtime.tables.record_files import Locate
from engram_runtime.tables.store import TableStore
from engram_runtime.tables.zeros import ZeroTable

Announce = Callable[[TableChoice], Progress]  # told of a table before it is opened; the other of its loading

AUTO_OPTIONS = TableOptions()


class OpenStore(Protocol):
    """What opens a table without loading it."""

    def __call__(
        self, spec: TableSpec, locate: Locate, decoder: RowDecoder, /, *, checksums: Checksums
    ) -> TableStore: ...


STORES: Mapping[str, OpenStore] = {MMAP: MappedTable, PREAD: PreadTable.open}


def silently(choice: TableChoice) -> Progress:
    """Announce nothing."""
    return no_progress


def choose_stores(
    bundle: Bundle, options: TableOptions = AUTO_OPTIONS, *, model_bytes: int = 0, hidden: Collection[str] = ()
) -> Sequence[TableChoice]:
    """Decide how each of a bundle's tables is read, in the manifest's order.

    Args:
        model_bytes: memory that the model beside them will still take.
        hidden: sites whose tables are not read, as overlays hide them.

    Raises:
        RequestError: they are to be resident and don't fit.
    """
    room = table_room(options, free_memory(), model_bytes)
    choices = []
    for spec in bundle.manifest.tables:
        if spec.site in hidden:
            choices.append(_unread(spec, room))
            continue
        choice = choose(table_facts(bundle, spec), options, room, disk_facts)
        room = replace(room, taken=room.taken + choice.table_bytes * (choice.io == RESIDENT))
        choices.append(choice)
    return choices


def _unread(spec: TableSpec, room: Room) -> TableChoice:
    return TableChoice(
        site=spec.site,
        io=UNREAD,
        table_bytes=spec.num_rows * spec.record.record_bytes,
        reason="an overlay stands for all of it",
        room_bytes=room.left,
    )


def table_facts(bundle: Bundle, spec: TableSpec) -> TableFacts:
    """Return what is known of a table without opening it; its largest file stands for all of them."""
    _, largest = max(
        ((rows.num_rows * part.row_bytes, rows) for part in spec.parts for rows in part.ranges), key=itemgetter(0)
    )
    path = Path(largest.file) if largest.external else bundle.file(largest.file)
    return TableFacts(
        site=spec.site,
        num_bytes=spec.num_rows * spec.record.record_bytes,
        reads=spec.keyer.columns * len(spec.parts),
        external=any(rows.external for rows in spec.ranges),
        leased=can_lease(path),
        path=path,
        place=place_of(path),
    )


def open_table(
    bundle: Bundle,
    spec: TableSpec,
    io: str,
    *,
    decoder: RowDecoder | None = None,
    progress: Progress = no_progress,
) -> TableStore:
    """Open a table.

    Args:
        io: ``resident``, ``mmap``, ``pread`` or ``unread``; `choose_stores` tells which.
        decoder: makes rows of records, or None for numpy's.
        progress: told the bytes of each block that is loaded.

    Raises:
        TableError: a file is missing, too short, or no longer the one that the bundle refers to.
        BundleError: the checksums are damaged.
    """
    if io == UNREAD:
        return ZeroTable()
    if decoder is None:
        decoder = NumpyRowDecoder(spec.record, [part.row_bytes for part in spec.parts])
    checksums = read_checksums(bundle, spec)
    if io == RESIDENT:
        return ResidentTable.load(spec, bundle.table_path, decoder, checksums=checksums, progress=progress)
    return STORES[io](spec, bundle.table_path, decoder, checksums=checksums)
