"""The bytes of machine code, held against their digest and then given to the loader as they were checked."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engram_runtime.errors import TargetError


@contextlib.contextmanager
def checked_code(path: Path, sha256: str) -> Iterator[Path]:
    """Yield a path to load a file's code from, whose bytes nobody can change any more.

    It has the file's name and is another one each time: loaders take a path they have seen for the library they have.

    Raises:
        TargetError: it can't be read, or has another digest.
    """
    code = _read(path, sha256)
    with tempfile.TemporaryDirectory(prefix="engram-") as folder:
        place = Path(folder) / path.name
        if hasattr(os, "memfd_create"):
            descriptor = _sealed(code, path.name)
            try:
                place.symlink_to(f"/proc/self/fd/{descriptor}")
                yield place
            finally:
                os.close(descriptor)
        else:  # macOS: the folder is this user's alone
            place.write_bytes(code)
            yield place


def checked_text(path: Path, sha256: str) -> str:
    """Return a file of kernel sources; raises TargetError where it can't be read, or has another digest."""
    return _read(path, sha256).decode()


def _read(path: Path, sha256: str) -> bytes:
    try:
        code = path.read_bytes()
    except OSError as error:
        raise TargetError(f"library {path} can't be loaded: {error.strerror}; compile it again") from error
    if hashlib.sha256(code).hexdigest() != sha256:
        raise TargetError(f"{path} is not what was compiled; compile the bundle again")
    return code


def _sealed(code: bytes, name: str) -> int:
    """Return a file without a place on disk, open for reading only from now on."""
    import fcntl

    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(code)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor
