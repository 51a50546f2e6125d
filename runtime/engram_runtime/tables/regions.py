"""Ranges of this process' addresses: files side by side, and memory in huge pages."""

import contextlib
import ctypes
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TableError
from engram_runtime.sizes import format_size
from engram_runtime.tables.record_files import RecordFiles

MAP_FIXED = 0x10  # Linux, on every processor but Alpha and PA-RISC; Python doesn't name it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


def reserve(num_bytes: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """Return so many bytes of addresses, zeros that take memory once they are written.

    Raises:
        TableError: the system doesn't grant them.
    """
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=prot)
    except OSError as error:
        raise TableError(
            f"{format_size(num_bytes)} of addresses for a table are refused: {error.strerror}; "
            f"free memory or raise this process' limit (ulimit -v)"
        ) from error


def map_files(files: RecordFiles) -> NDArray[np.uint8]:
    """Map the files of a table at their addresses; returns ``[num_bytes]``, read-only and for reads in any order.

    The map lasts as long as the array and views of it. What is behind the end of a file must not be touched.

    Raises:
        TableError: a file can't be mapped, or there are too few addresses.
    """
    region = reserve(files.num_bytes, prot=0)
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
    """Return ``[num_bytes]`` zeros in huge pages, as far as the system has them for those who ask.

    Raises:
        TableError: the system doesn't grant them.
    """
    region = reserve(num_bytes)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, dtype=np.uint8)
