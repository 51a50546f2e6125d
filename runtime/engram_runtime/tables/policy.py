"""Whether a table is held in memory or read row by row: decided by measurement, said in one sentence."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_runtime.errors import RequestError
from engram_runtime.memory import FreeMemory
from engram_runtime.sizes import format_seconds, format_size
from engram_runtime.tables.disk import AT_ONCE, DiskFacts
from engram_runtime.tables.options import AUTO, MMAP, PREAD, RESIDENT, TableOptions
from engram_runtime.tables.place import FUSE, MEMORY, NETWORK, REMOVABLE, Place

SMALL_BYTES = 64 << 20  # half a second of the slowest disk: it needn't be measured for that
SESSION_TOKENS = 2000  # whose rows may take as long to read as a table to load: a prompt and a long answer

UNSAFE_TO_MAP = {  # kinds of places that may shrink a file or go away; a map has no errors but the end of the process
    NETWORK: "on a network file system",
    FUSE: "on a FUSE file system",
    REMOVABLE: "on a removable disk",
}

Measure = Callable[[Path, Place], DiskFacts]  # of the disk under a file; see `engram_runtime.tables.disk.disk_facts`


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """What a decision goes by.

    Attributes:
        reads: places a token reads: its rows, each in as many as a record has parts.
        external: whether its files lie outside the bundle, where others may change them.
        leased: whether programs that would change them can be made to wait.
        path, place: of the largest of them, and what it lies on.
    """

    site: str
    num_bytes: int
    reads: int
    external: bool
    leased: bool
    path: Path
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What resident tables may take together: ``num_bytes``, which are ``words``, and ``taken`` of them so far.

    ``available`` is all the memory that there is beside the model.
    """

    num_bytes: int
    words: str
    available: int
    taken: int = 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return self.num_bytes - self.taken

    def __str__(self) -> str:
        return f"the {format_size(self.left)} that other tables leave of {self.words}" if self.taken else self.words


@dataclass(frozen=True, slots=True, kw_only=True)
class TableChoice:
    """How a table is read, and why.

    Attributes:
        io: ``resident``, ``mmap`` or ``pread``; ``unread`` where an overlay hides the table.
        table_bytes: its size.
        reason: words.
        room_bytes: what resident tables might have taken beside those before this one.
        load_s, session_s: of loading the table and of reading the rows of `SESSION_TOKENS` tokens, where both had to be
            weighed.
        device, disk: the disk they were told of.
    """

    site: str
    io: str
    table_bytes: int
    reason: str
    room_bytes: int
    load_s: float | None = None
    session_s: float | None = None
    device: str | None = None
    disk: DiskFacts | None = None

    def __str__(self) -> str:
        return f"table {self.site}: {self.io}, {format_size(self.table_bytes)}: {self.reason}"

    def figures(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def table_room(options: TableOptions, free: FreeMemory, model_bytes: int) -> Room:
    """Return what resident tables may take of the free memory beside a model of ``model_bytes``."""
    available = max(free.num_bytes - model_bytes, 0)
    words = f"the {format_size(available)} available" + (" in its control group" if free.of_group else "")
    if options.ram_bytes is not None and options.ram_bytes <= available:
        words = f"the {format_size(options.ram_bytes)} allowed"
        return Room(num_bytes=options.ram_bytes, words=words, available=available)
    if options.ram_bytes is not None or options.io == RESIDENT:
        return Room(num_bytes=available, words=words, available=available)
    return Room(num_bytes=available // 2, words=f"half of {words}", available=available)


def choose(table: TableFacts, options: TableOptions, room: Room, measure: Measure) -> TableChoice:
    """Decide how a table is read.

    Args:
        measure: tells of the disk under it, or raises OSError; called only where that decides.

    Raises:
        RequestError: it is to be resident and there isn't the room.
    """
    if options.io == AUTO:
        return _weigh(table, room, measure)
    if options.io == RESIDENT and table.num_bytes > room.left:
        raise RequestError(
            f"table {table.site} can't be resident: its {format_size(table.num_bytes)} are more than {room}; "
            f"give --table-io mmap, or more memory"
        )
    return _choice(table, room, options.io, "as asked for")


def _weigh(table: TableFacts, room: Room, measure: Measure) -> TableChoice:
    if table.num_bytes > room.left:
        return _unloaded(table, room, f"more than {room}")
    if table.num_bytes <= SMALL_BYTES:
        return _choice(table, room, RESIDENT, f"tables up to {format_size(SMALL_BYTES)} are, where there is room")
    if table.place.kind == MEMORY:
        return _unloaded(table, room, f"its files are in memory already ({table.place.file_system})")
    try:
        disk = measure(table.path, table.place)
    except OSError as error:
        return _unloaded(table, room, f"its disk can't be measured ({error.strerror})")
    load_s, session_s = table.num_bytes / disk.bytes_per_s, SESSION_TOKENS * disk.reads_s(table.reads)
    reason = (
        f"loading takes {format_seconds(load_s)}, reading the rows of {SESSION_TOKENS} tokens "
        f"{format_seconds(session_s)} ({table.place.device}: {AT_ONCE} reads in {format_seconds(disk.batch_p50_s)})"
    )
    weighed = {"load_s": load_s, "session_s": session_s, "device": table.place.device, "disk": disk}
    if load_s < session_s:
        return _choice(table, room, RESIDENT, reason, **weighed)
    return _unloaded(table, room, reason, **weighed)


def _unloaded(table: TableFacts, room: Room, reason: str, **weighed: Any) -> TableChoice:
    """Map files that stay as they are; read the others."""
    danger = _danger_of_a_map(table, room)
    if danger is None:
        return _choice(table, room, MMAP, reason, **weighed)
    return _choice(table, room, PREAD, f"{reason}; not mapped, as {danger}", **weighed)


def _danger_of_a_map(table: TableFacts, room: Room) -> str | None:
    """Say why a file should not be mapped.

    One that changes meanwhile ends the process, and where memory is short a map may wait page by page.
    """
    if table.external:
        return "its files lie outside the bundle"
    if table.place.kind in UNSAFE_TO_MAP:
        return f"its files lie {UNSAFE_TO_MAP[table.place.kind]} ({table.place.file_system})"
    if not table.leased:
        return "no lease keeps others from its files"
    return f"only {format_size(room.available)} are available" if table.num_bytes > room.available else None


def _choice(table: TableFacts, room: Room, io: str, reason: str, **weighed: Any) -> TableChoice:
    return TableChoice(
        site=table.site, io=io, table_bytes=table.num_bytes, reason=reason, room_bytes=room.left, **weighed
    )
