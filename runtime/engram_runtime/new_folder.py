"""Folders that are written whole or not at all, and never in place of another one unasked."""

import contextlib
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from engram_runtime.disk_space import written_to
from engram_runtime.errors import RequestError
from engram_runtime.exchange import exchange
from engram_runtime.new_file import flush
from engram_runtime.workplace import STAGED_FOLDER, clear, locked_workplace, remove, workplace


def check_new_folder(out: Path, mark: str, kind: str, *, replace: bool) -> None:
    """Refuse a place before what goes there is made.

    Args:
        mark: file that is in every folder of this kind: others are never replaced.
        kind: what such a folder is called.

    Raises:
        RequestError: ``out`` exists and is not such a folder, or is one and ``replace`` is False.
    """
    if not out.exists():
        return
    if not (out / mark).is_file():
        raise RequestError(f"{out} exists and is not {kind}; choose another place")
    if not replace:
        raise RequestError(f"{out} is {kind} already; replace it with --force or choose another place")


@contextlib.contextmanager
def new_folder(out: Path, mark: str, kind: str, *, replace: bool, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that is moved there on success.

    Args:
        mark, kind, replace: see `check_new_folder`, whose errors this raises as well.
        num_bytes: see `staged_place`.
    """
    with staged_place(out, "written", num_bytes) as folder:
        check_new_folder(out, mark, kind, replace=replace)
        yield folder


@contextlib.contextmanager
def staged_place(out: Path, doing: str, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place on success, whatever is there.

    Args:
        doing: what other processes are told happens to ``out``, as ``compiled to``.
        num_bytes: what will be in it, at least, where that is known.

    Raises:
        RequestError: another process writes there, or there is no space.
    """
    with written_to(out, num_bytes), locked_workplace(out, doing) as journal:
        journal.truncate(0)  # what an interrupted export noted is of no use to anything else
        restore_replaced(out)
        clear(out)
        folder = workplace(out) / f"{STAGED_FOLDER}-{os.getpid()}"  # a linker may live that was started for another one
        folder.mkdir()
        yield folder
        flush_tree(folder)
        move_into_place(folder, out)


def restore_replaced(out: Path) -> None:
    """Put back a folder that was moved aside by who was killed then, or remove it if the new one is there."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.replaced-*"):
        if out.exists():
            remove(folder)
        else:
            folder.rename(out)


def make_read_only(folder: Path) -> None:
    """Let nobody change the files in a folder by mistake; who owns it can still remove and replace them.

    Files that have another name elsewhere are left as they are.
    """
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            path.chmod(0o444)


def flush_tree(folder: Path) -> None:
    """Wait until a folder and all that is in it are on disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def move_into_place(scratch: Path, out: Path) -> None:
    """Give a folder that is on disk its name, in place of another one if there is one.

    One of the two is there at every moment where the system can swap names. The old one is removed only once the new
    name is on disk: a power cut in between must not leave a part of it.
    """
    old = scratch if out.exists() and exchange(scratch, out) else _renamed(scratch, out)
    flush(out.parent)
    remove(old)


def _renamed(scratch: Path, out: Path) -> Path:
    """Rename a folder and return where the one it replaces is by then, which comes back where that fails."""
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        scratch.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    return old
