"""madvise of thousands of ranges in a few calls."""

import ctypes
import mmap
import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_runtime.tables.record_file import CLOSED

WILL_NEED = 3  # reads are begun, nothing is waited for
POPULATE_READ = 22  # pages are there when it returns; what can't be read is an error and no SIGBUS; Linux 5.14
PROCESS_MADVISE = 440  # the system call's number on every processor; Linux 5.10
MOST_RANGES = 1024  # of one call: IOV_MAX
_libc = ctypes.CDLL(None)
_libc.syscall.restype = ctypes.c_long


class Advice(Protocol):
    """What tells the kernel about ranges of memory: `MemoryAdvice`, or a double of it."""

    def __call__(self, ranges: NDArray[np.int64], advice: int) -> int:
        """Advise ``[N, 2]``, first byte of a page and bytes; returns how many took it before one that failed."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class MemoryAdvice:
    """Advises many ranges with `process_madvise` where kernel and sandbox let it, else one by one with `madvise`.

    The kernel takes `WILL_NEED` this way since 5.10, `POPULATE_READ` since 6.13 (one by one since 5.14). Where even
    that is missing, `populates` is False and a page that can't be read kills the process when it is touched.
    """

    def __init__(self) -> None:
        self._open()
        page = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.uint8)
        ranges = np.array([[page.ctypes.data, mmap.PAGESIZE]], dtype=np.int64)
        self._batched = {advice for advice in (WILL_NEED, POPULATE_READ) if self._advise_block(ranges, advice)}
        self.populates = _advise_singly(ranges, POPULATE_READ) == 1

    def _open(self) -> None:
        self._owner = os.getpid()
        try:
            self._process = os.pidfd_open(self._owner)
        except OSError:  # an old kernel, or a sandbox: then nothing is batched
            self._process = CLOSED

    def __call__(self, ranges: NDArray[np.int64], advice: int) -> int:
        """See `Advice`; where pages can't be populated they are merely not there yet."""
        if self._owner != os.getpid():  # a forked child, whose handle is the parent's
            self.close()
            self._open()
        if advice == POPULATE_READ and not self.populates:
            return len(ranges)
        return self._advise_batched(ranges, advice) if advice in self._batched else _advise_singly(ranges, advice)

    def _advise_batched(self, ranges: NDArray[np.int64], advice: int) -> int:
        done = 0
        while done < len(ranges):
            taken = self._advise_block(ranges[done : done + MOST_RANGES], advice)
            if taken == 0:
                break
            done += taken
        return done

    def _advise_block(self, ranges: NDArray[np.int64], advice: int) -> int:
        address = ctypes.c_void_p(ranges.ctypes.data)
        count = _libc.syscall(PROCESS_MADVISE, self._process, address, ctypes.c_size_t(len(ranges)), advice, 0)
        if count == ranges[:, 1].sum():
            return len(ranges)
        return int(ranges[:, 1].cumsum().searchsorted(max(count, 0), side="right"))  # count is in bytes

    def close(self) -> None:
        """Release the handle of the process."""
        if self._process != CLOSED:
            os.close(self._process)
            self._process = CLOSED


def _advise_singly(ranges: NDArray[np.int64], advice: int) -> int:
    for done, (address, length) in enumerate(ranges.tolist()):
        if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice):
            return done
    return len(ranges)
