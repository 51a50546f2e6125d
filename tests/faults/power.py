"""What may be on a disk after a power cut: all that was synced, and some of the rest.

Files and folders are numbered, as inodes are. A change is a name in a folder, a file's size or a piece of its contents;
it is safe once what holds it was synced, and until then it may be there or not, whatever came before or after it. A
rename is one change, as it is in every journal.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.faults.shim import Change

Folder = dict[str, int]  # names and the numbers of what they name
ROOT = 0
PAGE_BYTES = 4096  # a write may be there in part, by pages
LAST = 40
LIKELY = (0.5, 0.8, 0.95, 0.99)  # that a change which isn't safe is there, in random choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names that change together: folder, name, and what it names from then on."""

    changed: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A file's length; ``grows`` does nothing to a longer one, what it adds is zero."""

    file: int
    length: int
    grows: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A piece of a file."""

    file: int
    offset: int
    data: bytes


Unit = Names | Size | Data


@dataclass(slots=True)
class Disk:
    """What lies below a folder; the numbers of folders are those of ``folders``, all others are files."""

    folders: dict[int, Folder] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, bytearray] = field(default_factory=dict)

    def copy(self) -> "Disk":
        """Return one of its own."""
        folders = {number: dict(names) for number, names in self.folders.items()}
        return Disk(folders, {number: bytearray(data) for number, data in self.files.items()})

    def apply(self, unit: Unit) -> None:
        """Make a change."""
        match unit:
            case Names():
                for folder, name, number in unit.changed:
                    self.folders[folder].pop(name, None)
                    if number is not None:
                        self.folders[folder][name] = number
            case Size():
                data = self.files[unit.file]
                if not unit.grows:
                    del data[unit.length :]
                data.extend(bytes(max(0, unit.length - len(data))))
            case Data():
                data = self.files[unit.file]
                data.extend(bytes(max(0, unit.offset - len(data))))
                data[unit.offset : unit.offset + len(unit.data)] = unit.data

    def number(self, path: PurePosixPath) -> int | None:
        """Return the number of what a path names, None for nothing."""
        number: int | None = ROOT
        for name in path.parts:
            number = self.folders.get(-1 if number is None else number, {}).get(name)
        return number

    def tree(self, number: int = ROOT, above: str = "") -> Iterator[tuple[str, int]]:
        """Yield the paths of all files and folders and their numbers."""
        for name, inside in sorted(self.folders[number].items()):
            yield f"{above}{name}", inside
            if inside in self.folders:
                yield from self.tree(inside, f"{above}{name}/")

    def write(self, place: Path) -> None:
        """Write all of it below a folder that is empty."""
        for path, number in self.tree():
            if number in self.folders:
                (place / path).mkdir()
            else:
                (place / path).write_bytes(self.files[number])

    def digest(self) -> bytes:
        """Return what tells it from other ones."""
        found = hashlib.sha256()
        for path, number in self.tree():
            found.update(path.encode() + b"\0" + hashlib.sha256(self.files.get(number, b"folder")).digest())
        return found.digest()


@dataclass(slots=True)
class Recorded:
    """What a program did to a disk.

    Attributes:
        before: the disk before.
        units: its changes in order.
        safe_from: of each, how many there were at the first sync that makes it safe, or None.
    """

    before: Disk
    units: list[Unit]
    safe_from: list[int | None]


def recorded(before: Mapping[str, bytes | None], changes: Iterable[Change], root: Path, after: Path) -> Recorded:
    """Read a record.

    Args:
        before: contents of what was below ``root``, None for folders.
        after: a copy of ``root`` at the end, for the contents of files that other programs wrote.
    """
    recorder = _Recorder(before)
    for change in changes:
        recorder.add(change, lambda path: PurePosixPath(path).relative_to(root), after)
    return Recorded(recorder.before, recorder.units, recorder.safe_from)


class _Recorder:
    def __init__(self, before: Mapping[str, bytes | None]) -> None:
        self.live = Disk()
        self.units: list[Unit] = []
        self.safe_from: list[int | None] = []
        self._numbers = iter(range(1, 1 << 30))
        for path, data in sorted(before.items()):
            self._make(PurePosixPath(path), data)
        self.before = self.live.copy()
        self.units, self.safe_from = [], []

    def add(self, change: Change, place: Callable[[str], PurePosixPath], after: Path) -> None:
        path = place(change.path)
        match change.kind:
            case "create":
                self._make(path, b"")
            case "mkdir":
                self._make(path, None)
            case "unlink" | "rmdir":
                self._name([(path, None)])
            case "rename":
                self._name([(path, None), (place(change.second), self.live.number(path))])
            case "exchange":
                other = place(change.second)
                self._name([(path, self.live.number(other)), (other, self.live.number(path))])
            case "truncate":
                self._add(Size(file=self._file(path), length=change.offset, grows=False))
            case "write":
                self._write(self._file(path), change.offset, change.data)
            case "fsync":
                if self.live.number(path) is None:  # a linker made it
                    self._make(path, (after / path.name).read_bytes())
                self._sync(self.live.number(path))

    def _make(self, path: PurePosixPath, data: bytes | None) -> None:
        number = next(self._numbers)
        for disk in (self.live, getattr(self, "before", self.live)):  # unnamed there until a change names it
            if data is None:
                disk.folders[number] = {}
            else:
                disk.files[number] = bytearray()
        self._name([(path, number)])
        self._write(number, 0, data or b"")

    def _write(self, file: int, offset: int, data: bytes) -> None:
        for start in range(0, len(data), PAGE_BYTES):
            page = data[start : start + PAGE_BYTES]
            self._add(Size(file=file, length=offset + start + len(page), grows=True))
            self._add(Data(file=file, offset=offset + start, data=page))

    def _name(self, named: list[tuple[PurePosixPath, int | None]]) -> None:
        self._add(Names(changed=tuple((self._folder(path), path.name, number) for path, number in named)))

    def _folder(self, path: PurePosixPath) -> int:
        number = self.live.number(path.parent)
        assert number is not None
        return number

    def _file(self, path: PurePosixPath) -> int:
        number = self.live.number(path)
        assert number is not None
        return number

    def _add(self, unit: Unit) -> None:
        self.live.apply(unit)
        self.units.append(unit)
        self.safe_from.append(None)

    def _sync(self, number: int | None) -> None:
        for place, unit in enumerate(self.units):
            holders = [folder for folder, *_ in unit.changed] if isinstance(unit, Names) else [unit.file]
            if number in holders and self.safe_from[place] is None:
                self.safe_from[place] = len(self.units)


def states(found: Recorded, rng: random.Random, most: int) -> Iterator[tuple[int, Disk]]:
    """Yield what may be on the disk if the power goes after each change: what is safe and some of the rest.

    Of what is not safe: all, nothing, names and sizes without contents, contents without names, and random choices.

    Args:
        most: moments to look at; the last `LAST`, where names are given, and others by chance.
    """
    chosen: list[Callable[[Unit], bool]] = [
        lambda unit: True,
        lambda unit: False,
        lambda unit: not isinstance(unit, Data),
        lambda unit: not isinstance(unit, Names),
        *[lambda unit, share=share: rng.random() < share for share in LIKELY],
    ]
    ends: Sequence[int] = range(len(found.units) + 1)
    if len(ends) > most:
        ends = sorted([*rng.sample(ends[:-LAST], most - LAST), *ends[-LAST:]])
    for end in ends:
        safe = [place is not None and place < end for place in found.safe_from[:end]]
        for choice in chosen if not all(safe) else chosen[:1]:
            disk = found.before.copy()
            for unit, kept in zip(found.units[:end], safe, strict=True):
                if kept or choice(unit):
                    disk.apply(unit)
            yield end, disk
