"""Disks that are full: found before work begins where that can be told, and said with what is missing where not."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engram_runtime.errors import RequestError
from engram_runtime.named_errors import naming

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, what a user may have of it, what a file may have


def check_space(out: Path, num_bytes: int) -> None:
    """Refuse a disk that can't take so many bytes below ``out``, whose parent exists; raises RequestError."""
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise _full(out, num_bytes, f"{free:,} are free") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def written_to(out: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Say where it was if a write fails, and what is needed if that is because of space.

    Args:
        num_bytes: what is written in all, at least; None where that isn't known.

    Raises:
        RequestError: there was no space for it.
    """
    try:
        with naming(out):
            yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(out, num_bytes, f"{error.strerror}".lower()) from error
        raise


def _full(out: Path, num_bytes: int | None, found: str) -> RequestError:
    needed = "" if num_bytes is None else f"at least {num_bytes:,} bytes are needed, "
    return RequestError(f"no space to write {out}: {needed}{found}; free some or choose another place")
