"""Files that are not everybody's to change, nor another user's; a group that may write is its owner's choice."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from engram_runtime.errors import BundleError


def check_owners(folder: Path, files: Iterable[Path]) -> None:
    """Refuse files, or a folder, that everybody may write or that another user but root owns.

    Raises:
        BundleError: naming the first one.
    """
    for path in (folder, *files):
        status = path.stat()
        if status.st_mode & stat.S_IWOTH:
            raise BundleError(f"{path} can be written by everybody; run: chmod o-w {path}")
        if status.st_uid not in (os.geteuid(), 0):
            raise BundleError(
                f"{path} belongs to user {status.st_uid}, who can change it; take a copy of your own, or leave out "
                f"--trust and --sha256"
            )
