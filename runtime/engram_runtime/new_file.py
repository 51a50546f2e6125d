"""Files that are written whole or not at all, and never in place of another one unasked."""

import contextlib
import fcntl
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engram_runtime.disk_space import written_to
from engram_runtime.errors import RequestError
from engram_runtime.named_errors import naming


def check_place(path: Path, *, replace: bool) -> None:
    """Refuse a place no file can be written to, before what it will hold is computed.

    Raises:
        RequestError: there is no folder for it, it is one or a device, or a file that may not be replaced.
    """
    if not path.parent.is_dir():
        raise RequestError(f"there is no folder {path.parent} to write {path.name} to; make it or choose another place")
    if path.is_dir():
        raise RequestError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # a rename would put a file in place of /dev/null
        raise RequestError(f"{path} is not a plain file; give the name of one")
    if os.path.lexists(path) and not replace:
        raise RequestError(f"{path} exists; replace it with --force or choose another place")


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool) -> Iterator[BinaryIO]:
    """Yield a file that is at ``path`` once it is whole and on disk.

    Raises:
        RequestError: there is no space, or as `check_place`.
    """
    check_place(path, replace=replace)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with written_to(path):
        _remove_left(path)
        file = scratch.open("xb")  # no link of another user's, nor what a process of this number in a container writes
        try:
            with file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
            flush(path.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def _remove_left(path: Path) -> None:
    """Remove what processes that were killed left of this file; those that still write hold a lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(left, "rb", opener=_open_plain) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _open_plain(path: str, flags: int) -> int:
    # A pipe would wait for a writer, a link may lead anywhere.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; the error of a disk that fails names it."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
