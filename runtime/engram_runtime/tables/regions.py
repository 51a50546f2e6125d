"""Ranges of this process' addresses: files side by side, and memory in huge pages."""

import contextlib
import ctypes
import mmap
import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TableError
from engram_runtime.tables.record_files import RecordFiles

MAP_FIXED = 0x10  # Linux, on every processor but Alpha and PA-RISC; Python doesn't name it
SMAPS = Path("/proc/self/smaps")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


def map_files(files: RecordFiles) -> NDArray[np.uint8]:
    """Map the files of a table at their addresses; returns ``[num_bytes]``, read-only and for reads in any order.

    The map lasts as long as the array and views of it. What is behind the end of a file must not be touched.

    Raises:
        TableError: a file can't be mapped.
    """
    region = mmap.mmap(-1, files.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
    memory = np.frombuffer(region, dtype=np.uint8)
    for file in files.files:
        start = memory.ctypes.data + file.start
        flags = mmap.MAP_SHARED | MAP_FIXED
        if _libc.mmap(start, file.num_bytes, mmap.PROT_READ, flags, file.descriptor, 0) != start:
            reason = os.strerror(ctypes.get_errno())
            raise TableError(f"table file {file.path} can't be mapped: {reason}; use pread")
    region.madvise(mmap.MADV_RANDOM)
    return memory


def allocate_huge(num_bytes: int) -> NDArray[np.uint8]:
    """Return ``[num_bytes]`` zeros in huge pages, as far as the system has them for those who ask."""
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages; `huge_bytes` tells
        region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, dtype=np.uint8)


def huge_bytes(memory: NDArray[np.uint8]) -> int:
    """Return how many bytes of an array are in huge pages now."""
    begin, end = memory.ctypes.data, memory.ctypes.data + len(memory)
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < end and begin < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += 1024 * int(line.split()[1])
    return total
