"""Pages of files in the system's memory: how many there are, and dropping them."""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

READ_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def evict(path: Path) -> None:
    """Drop a file's pages from the page cache; those that some process maps stay, and so do a tmpfs's."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(file)  # pages not written yet can't be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def fill(path: Path, num_bytes: int) -> None:
    """Read as much of a file as a cap of memory holds, so that every page read later takes the place of another."""
    with path.open("rb", buffering=0) as file:
        while num_bytes > 0 and (data := file.read(READ_BYTES)):
            num_bytes -= len(data)


def cached_share(path: Path) -> float:
    """Return which share of a file's pages is in the page cache; 1 where the system keeps that from this user."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = np.zeros(pages, dtype=np.uint8)
        # Copy-on-write only because ctypes takes the address of nothing read-only; no page is written to.
        start = ctypes.c_char.from_buffer(mapped)
        failed = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(found.ctypes.data))
        del start  # a map can't be closed while something points into it
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        return float((found & 1).mean())
