"""Write a folder beside its place and rename it there when it is whole; what an interruption leaves is resumed."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engram_export.journal import Journal
from engram_runtime.bundle import MANIFEST_NAME
from engram_runtime.errors import EngramError, RequestError
from engram_runtime.new_folder import check_new_folder, flush_tree, move_into_place, restore_replaced

JOURNAL_FILE, STAGED_FOLDER = "journal.jsonl", "bundle"


@contextlib.contextmanager
def staged_folder(out: Path, fingerprint: str, *, replace: bool) -> Iterator[Journal]:
    """Yield the journal of a folder that becomes ``out`` on success.

    An `EngramError` leaves nothing, as it would come again, unless a file could not be read. What else interrupts
    leaves the finished files beside ``out`` for the next export with the same fingerprint; any other removes them.

    Raises:
        RequestError: ``out`` is being exported to, exists and is not a bundle, or is one and ``replace`` is False.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out) as stream:
        restore_replaced(out)
        check_new_folder(out, MANIFEST_NAME, "a bundle", replace=replace)
        journal = Journal(stream, workplace(out) / STAGED_FOLDER, fingerprint)
        try:
            yield journal
            flush_tree(journal.folder)
            move_into_place(journal.folder, out)
            stream.truncate(0)
        except BaseException as error:
            if _comes_again(error) or journal.is_empty:
                stream.truncate(0)
            raise


def _comes_again(error: BaseException) -> bool:
    """Return whether the same export would end the same way; a file that can't be read may be readable later."""
    return isinstance(error, EngramError) and not isinstance(error.__cause__, OSError)


def workplace(out: Path) -> Path:
    """Return the folder beside ``out`` that holds an unfinished export and its journal."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[BinaryIO]:
    """Yield the journal, locked as long as this process lives; an empty one is removed with all that is beside it."""
    folder = workplace(out)
    folder.mkdir(exist_ok=True)
    path = folder / JOURNAL_FILE
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(out) from error
        if not _is_at(path, stream):
            raise _busy(out)  # it was removed by the export that held the lock until now
        try:
            yield stream
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                shutil.rmtree(folder / STAGED_FOLDER, ignore_errors=True)
                path.unlink()  # the last to go: until then no other export can begin
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _is_at(path: Path, stream: BinaryIO) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno()))


def _busy(out: Path) -> RequestError:
    return RequestError(f"{out} is being exported to by another process; wait for it or choose another place")
