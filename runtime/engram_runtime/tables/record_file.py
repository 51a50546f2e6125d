"""A file of records: read at any place, leased, and held against the checksums of its blocks."""

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TableError
from engram_runtime.table_spec import CHECKSUM_BLOCK_BYTES
from engram_runtime.tables.checksums import find_wrong_block

CLOSED = -1  # no file has this number


class Read(Protocol):
    """What reads files: `os.preadv`, or a double of it."""

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        """Fill buffers from a place in a file and return how many bytes that were, 0 at its end."""
        ...


class FileWanted(Exception):
    """Another program waits to change a leased file, whose path is the only argument."""


class RecordFile:
    """A file of records, open for reading at any place; its byte i has address ``start + i``."""

    def __init__(
        self, path: Path, start: int, num_bytes: int, read: Read, checksums: NDArray[np.uint32] | None = None
    ) -> None:
        self.path = path
        self.start = start
        self.num_bytes = num_bytes  # as far as its records go
        self._checksums = None if checksums is None else checksums.data  # whose items are Python's integers
        self._read = read
        self._leased = False
        try:
            # Without O_NONBLOCK a pipe in place of the file would wait for a writer.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TableError(f"table file {path} can't be opened: {error.strerror}; export the bundle again") from error
        self._size = os.fstat(self.descriptor).st_size
        if self._size < num_bytes:
            self.close()
            raise TableError(f"table file {path} holds {self._size} bytes, its rows need {num_bytes}; export it again")

    def lease(self) -> bool:
        """Make programs that would write to the file or truncate it wait; returns whether the system grants that.

        They wait until `end_lease`, but not longer than /proc/sys/fs/lease-break-time, 45 s as a rule. It is granted to
        the owner of a file that nobody has open for writing, see fcntl(2).
        """
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETSIG, signal.SIGURG)  # ignored, where SIGIO would end the process
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:
            return False
        self._leased = True
        return True

    def end_lease(self) -> None:
        """Let others change the file."""
        if self._leased:
            self._leased = False
            with contextlib.suppress(BlockingIOError):  # its time was over, so that the system has ended it
                fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def check(self) -> None:
        """Raise TableError if the file has become shorter than its records; a leased one can't before it is wanted.

        Raises:
            FileWanted: another program waits to change it, until `end_lease` or its time is over.
            OSError: the file was closed.
        """
        if self._leased:
            if fcntl.fcntl(self.descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                raise FileWanted(self.path)
            return
        # A third of what fstat costs; nothing here reads from where the descriptor stands.
        if os.lseek(self.descriptor, 0, os.SEEK_END) < self.num_bytes:
            raise TableError(f"table file {self.path} ends before byte {self.num_bytes}: it was truncated")

    def read_if_cached(self, buffer: memoryview, offset: int) -> bool:
        """Fill a buffer of bytes if that takes no waiting, else return False."""
        try:
            return self._read(self.descriptor, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise self._unreadable(offset, error) from error
            return False  # on such a file system nothing tells what is in memory

    def announce(self, offset: int, num_bytes: int) -> None:
        """Ask the disk for bytes that are about to be read."""
        os.posix_fadvise(self.descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of bytes from a place in the file."""
        while buffer:
            try:
                count = self._read(self.descriptor, [buffer], offset)
            except OSError as error:
                raise self._unreadable(offset, error) from error
            if count == 0:
                raise TableError(f"table file {self.path} ends before byte {offset + len(buffer)}: it was truncated")
            buffer, offset = buffer[count:], offset + count

    @property
    def is_checked(self) -> bool:
        """Whether there are checksums of its blocks."""
        return self._checksums is not None

    def blocks(self, offset: int, num_bytes: int) -> tuple[int, int]:
        """Return where the blocks begin and end that hold so many bytes from a place on."""
        stop = -(-(offset + num_bytes) // CHECKSUM_BLOCK_BYTES) * CHECKSUM_BLOCK_BYTES
        return offset & -CHECKSUM_BLOCK_BYTES, min(stop, self._size)

    def check_blocks(self, data: memoryview, offset: int) -> None:
        """Raise TableError unless ``data``, whole blocks from a place in the file on, is what was written there."""
        if self._checksums is None:
            return
        first = offset // CHECKSUM_BLOCK_BYTES
        count = -(-len(data) // CHECKSUM_BLOCK_BYTES)
        if wrong := find_wrong_block(data, self._checksums[first : first + count], first):
            raise TableError(
                f"table file {self.path} is damaged: block {wrong.number}, {CHECKSUM_BLOCK_BYTES} bytes from byte "
                f"{wrong.number * CHECKSUM_BLOCK_BYTES} on, has CRC-32 {wrong.found:08x}, not {wrong.expected:08x}; "
                f"copy the file anew or export the bundle again"
            )

    def read_blocks(self, offset: int, num_bytes: int) -> tuple[int, memoryview]:
        """Return the blocks that hold so many bytes from a place on, checked, and where the first one begins."""
        begin, end = self.blocks(offset, num_bytes)
        blocks = np.empty(end - begin, dtype=np.uint8).data
        self.read_into(blocks, begin)
        self.check_blocks(blocks, begin)
        return begin, blocks

    def read_checked(self, buffer: memoryview, offset: int) -> None:
        """Do `read_into` and raise TableError where a block that holds some of the bytes isn't what was written."""
        if not self.is_checked or not buffer or self.blocks(offset, len(buffer)) == (offset, offset + len(buffer)):
            self.read_into(buffer, offset)
            self.check_blocks(buffer, offset)
        else:
            begin, blocks = self.read_blocks(offset, len(buffer))
            buffer[:] = blocks[offset - begin :][: len(buffer)]

    def _unreadable(self, offset: int, error: OSError) -> Exception:
        if self.descriptor == CLOSED:
            return error
        return TableError(f"table file {self.path} can't be read at {offset}: {error.strerror}")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self.end_lease()  # which a map that somebody still holds would keep
        # Closing twice would close whatever file has been given the number since.
        if self.descriptor != CLOSED:
            os.close(self.descriptor)
            self.descriptor = CLOSED


def can_lease(path: Path) -> bool:
    """Return whether the system grants this process a lease of a file, see `RecordFile.lease`."""
    try:
        file = RecordFile(path, 0, 0, os.preadv)
    except TableError:
        return False
    granted = file.lease()
    file.close()
    return granted


class BlockReader:
    """Reads pieces of files with the blocks they lie in, which are checked; of pieces in order each block once."""

    def __init__(self) -> None:
        self._file: RecordFile | None = None
        self._begin, self._blocks = 0, memoryview(b"")

    def read_into(self, file: RecordFile, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of bytes from a place in a file; raises what `RecordFile.read_checked` does."""
        if not file.is_checked:
            return file.read_into(buffer, offset)
        end = offset + len(buffer)
        if file is not self._file or not self._begin <= offset <= end <= self._begin + len(self._blocks):
            self._file = None  # where the read fails nothing is held
            self._begin, self._blocks = file.read_blocks(offset, len(buffer))
            self._file = file
        buffer[:] = self._blocks[offset - self._begin : end - self._begin]
