"""Where a batch's answers go: one line each, what is there already stays."""

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from engram_runtime.batch.lines import Line, LineIndex, index_lines, read_lines
from engram_runtime.batch.result import BEGINNING, answered, result_key
from engram_runtime.disk_space import written_to
from engram_runtime.errors import BundleError, RequestError
from engram_runtime.new_file import check_place

MAX_RESULT_BYTES = 256 << 20  # eight texts of 8192 tokens with 20 log-probabilities each are half of it
SYNC_S = 5.0  # what a power cut may cost


class OutputFile:
    """A file of answers that is open for more; no other process may have it.

    Attributes:
        index: of the answers that were there when it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Open or make it; a last line that isn't whole is cut off.

        Raises:
            RequestError: it can't be there, holds anything else, or is being written.
        """
        check_place(path, replace=True)
        self._path = path
        self._file: BinaryIO = path.open("a+b")
        try:
            _lock(self._file, path)
            with written_to(path):
                self.index = self._read(path)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def append(self, text: bytes) -> None:
        """Write a line, which the system has when this returns; the disk gets it with the first one after `SYNC_S`.

        Raises:
            RequestError: there is no space for it.
        """
        with written_to(self._path):
            self._file.write(text)
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def check_belongs(self, batch: LineIndex) -> None:
        """Refuse a file with an answer to a request that is not in the batch."""
        for line in self.index.without(batch.keys).lines(MAX_RESULT_BYTES):
            custom_id, _ = answered(line)
            if custom_id is not None:  # else a bad line's, which may have been mended since
                raise RequestError(
                    f"line {line.number} of {self.index.path} answers custom_id {custom_id!r}, which {batch.path} "
                    "doesn't have: it belongs to another input; choose another place"
                )

    def _read(self, path: Path) -> LineIndex:
        end = 0

        def whole_lines() -> Iterator[Line]:
            nonlocal end
            for line in read_lines(self._file, MAX_RESULT_BYTES):
                if not line.ended:
                    _check_torn(line)
                    return
                end = line.start + len(line.text)
                yield line

        self._file.seek(0)
        try:
            index = index_lines(path, whole_lines(), result_key)
        except BundleError as error:
            raise RequestError(f"{path} is no output of a batch: {error}; choose another place") from error
        self._file.truncate(end)
        return index

    def close(self) -> None:
        """Have everything on disk and close it."""
        with written_to(self._path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RequestError(f"another process writes {path}; let it finish or choose another place") from error


def _check_torn(line: Line) -> None:
    """Refuse a line without an end that isn't the beginning of an answer; it would be cut off."""
    beginning = line.text[: len(BEGINNING)]
    if len(line.text) > MAX_RESULT_BYTES or not BEGINNING.startswith(beginning):
        raise BundleError(f"line {line.number} is no answer")
