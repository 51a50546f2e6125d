"""Which files of an export are finished, so that one that was interrupted can be resumed."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from engram_runtime.bundle import file_identity, file_sha256
from engram_runtime.errors import BundleError
from engram_runtime.manifest import contained_path
from engram_runtime.new_file import flush
from engram_runtime.strict_json import Fields, parse_json_object

VERSION = 2  # of the journal itself
Facts = Mapping[str, float] | None  # what is worth keeping of how a file was made
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedFile:
    """A file that is whole and on the disk; ``path`` is relative to the folder being written.

    By its ``inode`` it is told from a file of the bundle that was replaced, whose place it has if the export was
    stopped before that was removed.
    """

    path: str
    bytes: int
    inode: int
    sha256: str
    facts: Facts

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse a line; raises BundleError for one that no export wrote."""
        file = cls(
            path=contained_path(fields.take("path", str)),
            bytes=fields.count("bytes"),
            inode=fields.count("inode"),
            sha256=fields.take("sha256", str),
            facts=dict(fields.fields("facts").remaining()) if fields.given("facts") else None,
        )
        fields.finish()
        return file


class Journal:
    """The finished files of ``folder``, each noted in a line of JSON once it is on the disk.

    The first line is the fingerprint of what is exported; files of any other export are of no use to this one.
    """

    def __init__(self, stream: BinaryIO, folder: Path, fingerprint: str) -> None:
        """Keep the files an interrupted export with this fingerprint has finished and remove everything else.

        Args:
            stream: the journal, open for reading and appending.
        """
        self.folder = folder
        self._stream = stream
        noted = _read_lines(stream, fingerprint)
        self.dropped = folder.exists() and noted is None
        self._finished = {file.path: file for file in noted or () if _is_whole(folder, file)}
        self.kept = frozenset(self._finished)
        _remove_others(folder, self.kept)
        folder.mkdir(exist_ok=True)
        stream.truncate(0)
        self._append({"fingerprint": fingerprint, "version": VERSION}, *map(asdict, self._finished.values()))

    @property
    def is_empty(self) -> bool:
        """Whether no file is finished."""
        return not self._finished

    def once(self, path: Path, write: Callable[[], Facts], progress: Progress) -> Facts:
        """Write a file unless it was kept, whose size ``progress`` is told; returns its facts."""
        name = self._name(path)
        if name in self._finished:
            progress(self._finished[name].bytes)
        else:
            facts = write()
            flush(path)
            status = path.stat()
            file = FinishedFile(
                path=name, bytes=status.st_size, inode=status.st_ino, sha256=file_sha256(path), facts=facts
            )
            self._append(asdict(file))
            self._finished[name] = file
        return self._finished[name].facts

    def sha256(self, path: Path, progress: Progress) -> str:
        """Return a file's digest; a file that was kept is read again and held against its line.

        Raises:
            BundleError: a kept file has other contents by now.
        """
        file = self._finished.get(self._name(path))
        if file is not None and file.path not in self.kept:
            progress(file.bytes)
            return file.sha256
        found = file_sha256(path, progress)
        if file is not None and found != file.sha256:
            raise BundleError(f"{file.path} is not what the interrupted export wrote; run the same command again")
        return found

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @property
    def kept_bytes(self) -> int:
        """Size of the files an interrupted export had finished."""
        return sum(self._finished[path].bytes for path in self.kept)

    def _append(self, *lines: Mapping[str, Any]) -> None:
        self._stream.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def fingerprint(options: Mapping[str, str], files: Iterable[Path]) -> str:
    """Return the SHA-256 of what decides an export's bytes.

    Args:
        options: what the user asked for, and the version that exports it.
        files: all files of the checkpoint; size, time of change and first 64 KiB stand for their contents.
    """
    facts = [[str(path.resolve()), path.stat().st_mtime_ns, file_identity(path)] for path in sorted(files)]
    return hashlib.sha256(json.dumps([dict(options), facts], sort_keys=True).encode()).hexdigest()


def _read_lines(stream: BinaryIO, fingerprint: str) -> list[FinishedFile] | None:
    """Return the files of a journal, or None where it is another export's or damaged; a line cut short ends it."""
    stream.seek(0)
    try:
        first, *others = [parse_json_object(line, "a line") for line in stream.read().split(b"\n")[:-1]] or [{}]
        if first != {"fingerprint": fingerprint, "version": VERSION}:
            return None
        return [FinishedFile.from_fields(Fields(line, "a line")) for line in others]
    except BundleError:
        return None


def _is_whole(folder: Path, file: FinishedFile) -> bool:
    path = folder / file.path
    if not path.is_file():
        return False
    status = path.stat()
    return (status.st_size, status.st_ino) == (file.bytes, file.inode)


def _remove_others(folder: Path, kept: frozenset[str]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder itself
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in kept:
            path.unlink()
