"""Where this user keeps what can be had again: facts about disks, files that were downloaded."""

import errno
import os
from pathlib import Path

NAME = "engram-edge"


def cache_folder() -> Path:
    """Return this project's folder among the user's caches, which may not exist yet.

    Raises:
        OSError: this user has no folder for caches.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # others are to be ignored, says the specification
        return given / NAME
    try:
        return Path.home() / ".cache" / NAME
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "no home folder; set XDG_CACHE_HOME") from error
