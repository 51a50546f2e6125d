"""Reads of a file past the page cache, several in flight: what its disk does, not what memory remembers of it.

Linux AIO (io_setup(2)), as glibc doesn't wrap it and io_uring is forbidden in many containers.
"""

import ctypes
import errno
import mmap
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 4096  # what a cold row costs: a page, at a place that every disk can read directly
NUMBERS = {  # of the system calls setup, destroy, submit, getevents
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
}
REQUEST = np.dtype(  # struct iocb of linux/aio_abi.h on little-endian machines
    {
        "names": ["data", "opcode", "file", "buffer", "bytes", "offset"],
        "formats": ["<u8", "<u2", "<u4", "<u8", "<u8", "<i8"],
        "offsets": [0, 16, 20, 24, 32, 40],
        "itemsize": 64,
    }
)
EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("result2", "<i8")])  # struct io_event

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadTimes:
    """How long reads took: ``latencies_s [N]`` float64 each from its submission, ``elapsed_s`` all of them."""

    latencies_s: NDArray[np.float64]
    elapsed_s: float


class DirectReader:
    """A file open for direct reads (O_DIRECT), at most ``depth`` of them in flight; what they read is thrown away.

    Use it from one thread and close it, best by ``with``.
    """

    def __init__(self, path: Path, depth: int, block_bytes: int = BLOCK_BYTES) -> None:
        """Open a file.

        Args:
            block_bytes: how much one read takes, a multiple of `BLOCK_BYTES`.

        Raises:
            OSError: the file, direct reads of it or asynchronous ones are refused; a file system in memory may take
                them and answer from memory.
        """
        self._path, self._depth, self._block_bytes = path, depth, block_bytes
        self._setup, self._destroy, self._submit, self._getevents = _numbers()
        self._context = ctypes.c_ulong(0)
        self._buffer = np.frombuffer(mmap.mmap(-1, depth * block_bytes), dtype=np.uint8)  # at a page's beginning
        self._events = np.zeros(depth, dtype=EVENT)
        with self._refusals("can't be read directly"):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            with self._refusals("can't be read asynchronously"):
                _call(self._setup, depth, ctypes.byref(self._context))
        except OSError:
            os.close(self._file)
            raise

    def read(self, offsets: NDArray[np.int64]) -> ReadTimes:
        """Read the block around each of ``[N]`` places, in their order; the buffer of one may be another's as well.

        A block begins at a multiple of `BLOCK_BYTES`.

        Raises:
            OSError: the disk fails, or a place lies beyond the end of the file; nothing can be read afterwards.
        """
        count = len(offsets)
        requests = self._requests(offsets)
        places = (requests.ctypes.data + REQUEST.itemsize * np.arange(count)).astype(np.uint64)
        begun, ended = np.empty(count), np.empty(count)
        sent = done = 0
        while done < count:
            if (more := min(self._depth - (sent - done), count - sent)) > 0:
                begun[sent : sent + more] = time.perf_counter()
                with self._refusals("can't be read"):
                    sent += _call(self._submit, self._context, more, ctypes.c_void_p(places.ctypes.data + 8 * sent))
            finished = self._wait(sent - done, offsets)
            ended[finished] = time.perf_counter()
            done += len(finished)
        return ReadTimes(latencies_s=ended - begun, elapsed_s=float(ended.max() - begun[0]) if count else 0.0)

    def _requests(self, offsets: NDArray[np.int64]) -> NDArray[Any]:
        requests = np.zeros(len(offsets), dtype=REQUEST)
        requests["data"] = np.arange(len(offsets))
        requests["file"] = self._file
        requests["buffer"] = self._buffer.ctypes.data + np.arange(len(offsets)) % self._depth * self._block_bytes
        requests["bytes"] = self._block_bytes
        requests["offset"] = offsets // BLOCK_BYTES * BLOCK_BYTES
        return requests

    def _wait(self, in_flight: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Wait for one read or more; returns their numbers."""
        events = ctypes.c_void_p(self._events.ctypes.data)
        with self._refusals("can't be read"):
            finished = self._events[: _call(self._getevents, self._context, 1, in_flight, events, None)]
        for number, result in zip(finished["data"].tolist(), finished["result"].tolist(), strict=True):
            if result <= 0:
                reason = os.strerror(-result) if result else "it ends before that"
                raise OSError(-result or errno.EIO, f"{self._path} can't be read at {offsets[number]}: {reason}")
        return finished["data"].astype(np.int64)

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Say of which file the system refuses what."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{self._path} {what}: {error.strerror}") from error

    def close(self) -> None:
        """Wait for what is in flight and close the file; a second call does nothing."""
        if self._context.value:
            _call(self._destroy, self._context)
            self._context = ctypes.c_ulong(0)
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _numbers() -> tuple[int, int, int, int]:
    machine = platform.machine()
    if machine not in NUMBERS:
        raise OSError(errno.ENOSYS, f"asynchronous reads are known on {sorted(NUMBERS)}, this machine is {machine}")
    return NUMBERS[machine]


def _call(number: int, *arguments: Any) -> int:
    """Make a system call; raises OSError where it fails, and repeats it where a signal came between."""
    whole = [ctypes.c_long(each) if isinstance(each, int) else each for each in (number, *arguments)]
    while (result := int(_libc.syscall(*whole))) < 0:
        if (code := ctypes.get_errno()) != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return result
