"""Write a folder beside its place and rename it there when it is whole; what an interruption leaves is resumed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from engram_export.journal import Journal
from engram_runtime.bundle import MANIFEST_NAME
from engram_runtime.disk_space import FULL, written_to
from engram_runtime.errors import EngramError
from engram_runtime.new_folder import check_new_folder, flush_tree, make_read_only, move_into_place, restore_replaced
from engram_runtime.workplace import STAGED_FOLDER, locked_workplace, workplace


@contextlib.contextmanager
def staged_folder(out: Path, fingerprint: str, *, replace: bool, num_bytes: int | None = None) -> Iterator[Journal]:
    """Yield the journal of a folder that becomes ``out`` on success.

    An `EngramError` leaves nothing, as it would come again, unless a file could not be read; nor does a full disk,
    which others need. What else interrupts leaves the finished files beside ``out`` for the next export with the same
    fingerprint; any other removes them.

    Args:
        num_bytes: what will be in it, at least.

    Raises:
        RequestError: ``out`` is being exported to, exists and is not a bundle, or is one and ``replace`` is False, or
            there is no space.
    """
    with written_to(out, num_bytes), locked_workplace(out, "exported to") as stream:
        folder = workplace(out) / STAGED_FOLDER
        if not folder.exists():
            stream.truncate(0)  # it was moved to its place
        restore_replaced(out)
        check_new_folder(out, MANIFEST_NAME, "a bundle", replace=replace)
        journal = Journal(stream, folder, fingerprint)
        try:
            yield journal
            make_read_only(journal.folder)
            flush_tree(journal.folder)
            move_into_place(journal.folder, out)
            stream.truncate(0)
        except BaseException as error:
            if _comes_again(error) or journal.is_empty:
                stream.truncate(0)
            raise


def _comes_again(error: BaseException) -> bool:
    """Return whether the same export would end the same way; a file that can't be read may be readable later."""
    if isinstance(error, EngramError):
        return not isinstance(error.__cause__, OSError)
    return isinstance(error, OSError) and error.errno in FULL
