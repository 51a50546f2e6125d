"""Files that are written whole or not at all, and never in place of another one unasked."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engram_runtime.errors import RequestError


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
    """Yield a file that is at ``path`` once it is whole; raises what `check_place` does."""
    check_place(path, replace=replace)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
