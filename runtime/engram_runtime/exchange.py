"""Two names on one disk swapped in one step, which is there at every moment whatever happens."""

import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
REFUSED = (errno.ENOSYS, errno.EINVAL, errno.EPERM)  # of a kernel or a file system without it, of a sandbox


def exchange(one: Path, other: Path) -> bool:
    """Swap two names; returns False where this system can't.

    Raises:
        OSError: one isn't there, or the disk fails.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in REFUSED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
