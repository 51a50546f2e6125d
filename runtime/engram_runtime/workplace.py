"""The folder beside a place where one process at a time makes what will be there."""

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engram_runtime.errors import RequestError

JOURNAL_FILE, STAGED_FOLDER = "journal.jsonl", "bundle"


def workplace(out: Path) -> Path:
    """Return the folder beside ``out`` that holds what isn't finished."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def locked_workplace(out: Path, doing: str) -> Iterator[BinaryIO]:
    """Have the workplace of ``out`` to oneself; yields its journal, open for reading and appending.

    The lock ends with the process, whatever ends it, and is seen by all who share the disk. A workplace whose journal
    is empty at the end is removed with all that is in it.

    Args:
        doing: what others are told happens to ``out``, as ``exported to``.

    Raises:
        RequestError: another process or another user has it.
    """
    folder = workplace(out)
    _make_own(folder)
    path = folder / JOURNAL_FILE
    try:
        journal = path.open("a+b")
    except FileNotFoundError as error:
        raise _busy(out, doing, None) from error  # the folder was removed by the process that had it until now
    with journal as stream:
        _lock(stream, path, out, doing)
        try:
            yield stream
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                clear(out)
                path.unlink()  # the last to go: until then no other process can begin
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _lock(stream: BinaryIO, path: Path, out: Path, doing: str) -> None:
    """Lock the journal of ``out``, opened at ``path``; raises what `locked_workplace` does."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(out, doing, holder(stream)) from error
    if not _is_at(path, stream):
        raise _busy(out, doing, None)  # it was removed by the process that held the lock until now


def _make_own(folder: Path) -> None:
    """Make a folder, or take one of this user: in one of somebody else a link may lead to this user's own files."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        status = folder.lstat()
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            raise RequestError(f"{folder} is no folder of this user's; remove it or choose another place") from error


def clear(out: Path) -> None:
    """Remove what was made in the workplace of ``out``; a file that can't be removed stays."""
    for made in workplace(out).iterdir():
        if made.name != JOURNAL_FILE:
            remove(made)


def remove(path: Path) -> None:
    """Remove a folder and all that is in it, of a link nothing but that; what can't be removed stays."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def holder(file: BinaryIO) -> int | None:
    """Return the id of the process that has locked a file, or None where this system doesn't tell."""
    status = os.fstat(file.fileno())
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines)  # "1: FLOCK ADVISORY WRITE 812 fe:00:1234 0 EOF"
    return next(
        (int(words[4]) for words in found if words[1] == "FLOCK" and words[5] == place and words[4] > "0"), None
    )


def _is_at(path: Path, stream: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _busy(out: Path, doing: str, process: int | None) -> RequestError:
    who = "another process" if process is None else f"process {process}"
    return RequestError(f"{out} is being {doing} by {who}; wait for it or choose another place")
