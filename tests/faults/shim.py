"""File calls that fail on purpose, and a record of what was written: the Python side of shim.c.

A C library that is loaded before the system's own sees the calls of Python, NumPy, TVM and all others alike, where a
layer in our code would see ours alone. What stays unseen are calls within the C library, ``fwrite`` above all.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.faults.row import CannotRun

SOURCE = Path(__file__).with_name("shim.c")
CHANGES = ("create", "write", "fsync", "close", "truncate", "rename", "mkdir", "unlink", "rmdir", "chmod", "copy")
CALLS = {name: 1 << place for place, name in enumerate(("open", "read", "pread", *CHANGES))}  # as shim.c has them
SHORT = -1  # in place of an errno: half of a read or write is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Which calls fail: the ``nth`` of those of these kinds whose path contains a text, or all from there on.

    Attributes:
        calls: names in `CALLS`; ``create`` opens with O_CREAT or O_TRUNC, ``pread`` and ``write`` are all their kinds.
            A ``close`` is one of a file that may be written.
        error: errno, or `SHORT`. A ``close`` that fails has closed.
    """

    calls: tuple[str, ...]
    nth: int = 1
    error: int = errno.EIO
    sticky: bool = False
    path: str


@dataclass(frozen=True, slots=True)
class Change:
    """A noted call.

    Attributes:
        kind: create, write, truncate, fsync, rename, exchange, mkdir, unlink or rmdir.
        offset: of what was written; for truncate the new length.
        second: where ``path`` was renamed to, or what it was exchanged with.
    """

    kind: str
    path: str
    offset: int
    second: str
    data: bytes


@cache
def library() -> Path:
    """Build the library, once for its source; raises CannotRun where there is no C compiler."""
    if sys.platform != "linux":
        raise CannotRun("file calls are made to fail by LD_PRELOAD, which is Linux's")
    name = f"engram-fault-shim-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}-{os.getuid()}.so"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
        command = [
            *compiler,
            "-std=gnu11",
            "-O1",
            "-shared",
            "-fPIC",
            "-pthread",
            "-o",
            str(scratch),
            str(SOURCE),
            "-ldl",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "No module named" in done.stderr:
            raise CannotRun("there is no C compiler: install gcc")
        if done.returncode != 0:
            raise RuntimeError(f"{SOURCE.name} isn't compiled: {done.stderr.strip()[-800:]}")
        scratch.replace(path)
    return path


def preloaded() -> dict[str, str]:
    """Return this process's environment with the library, for a child whose calls are to fail."""
    return {**os.environ, "LD_PRELOAD": str(library())}


def arm(fault: Fault) -> None:
    """Have calls of this process fail from now on; it must have been started with `preloaded`."""
    kinds = sum(CALLS[name] for name in fault.calls)
    _shim().shim_arm(kinds, ctypes.c_long(fault.nth), fault.error, int(fault.sticky), fault.path.encode())


def disarm() -> int:
    """Have none fail any more; returns how many calls were counted since `arm`."""
    count = seen()
    _shim().shim_arm(0, ctypes.c_long(0), 0, 0, b"")
    return count


def seen() -> int:
    """Return how many calls the armed fault has counted."""
    count: int = _shim().shim_seen()
    return count


def record(log: Path, below: str) -> None:
    """Note changes of what lies below a path from now on; copies inside the kernel are refused meanwhile."""
    _shim().shim_record(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), below.encode())


def stop_recording() -> None:
    """Note nothing any more."""
    _shim().shim_record(-1, b"")


def changes(log: Path) -> Iterator[Change]:
    """Read what was noted, in order."""
    with log.open("rb") as file:
        while line := file.readline():
            head, second = line.rstrip(b"\n").decode().split("\t")
            kind, _, offset, length, path = head.split(" ", 4)
            yield Change(kind, path, int(offset), second, file.read(int(length)))


def _shim() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    if not hasattr(found, "shim_arm"):
        raise CannotRun("this process was started without shim.preloaded()")
    found.shim_seen.restype = ctypes.c_long
    return found
