"""Lines of files of any size, and which of them are the same request."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        number: from 1.
        start: where it begins, in bytes.
        text: with its newline, if it has one.
    """

    number: int
    start: int
    text: bytes

    @property
    def ended(self) -> bool:
        """Whether it has its newline."""
        return self.text.endswith(b"\n")


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[Line]:
    """Yield all lines; of one with more than ``max_bytes`` the first ``max_bytes + 1``."""
    number = start = 0
    while text := file.readline(max_bytes + 1):
        number += 1
        yield Line(number, start, text)
        start += len(text)
        while not text.endswith(b"\n") and (text := file.readline(max_bytes + 1)):
            start += len(text)


def key(custom_id: str | None, number: int) -> bytes:
    """Return what tells a request from others: its id, or the line where it has none."""
    if custom_id is None:
        return hashlib.blake2b(str(number).encode(), digest_size=KEY_BYTES, person=b"line").digest()
    return hashlib.blake2b(custom_id.encode(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True, slots=True)
class LineIndex:
    """Where the lines of a file are, and which requests they are of; 32 bytes in memory for each.

    Attributes:
        numbers: ``[N]`` from 1, without those that are blank.
        starts: ``[N]`` bytes.
        keys: ``[N]`` of `KEY_BYTES` each.
    """

    path: Path
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]
    keys: NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.keys)

    def at(self, places: NDArray[np.int64] | NDArray[np.bool_] | Sequence[int]) -> "LineIndex":
        """Return the index of some of the lines."""
        return LineIndex(self.path, self.numbers[places], self.starts[places], self.keys[places])

    def without(self, keys: NDArray[np.bytes_]) -> "LineIndex":
        """Return the index of the lines of other requests."""
        return self.at(~np.isin(self.keys, keys))

    def lines(self, max_bytes: int) -> Iterator[Line]:
        """Read the lines, cut as `read_lines` cuts them."""
        return lines_at(self.path, self.numbers.tolist(), self.starts.tolist(), max_bytes)


def lines_at(path: Path, numbers: Iterable[int], starts: Iterable[int], max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a file that begin at ``starts``, cut as `read_lines` cuts them."""
    with path.open("rb") as file:
        for number, start in zip(numbers, starts, strict=True):
            file.seek(start)
            yield Line(number, start, file.readline(max_bytes + 1))


def index_lines(path: Path, lines: Iterable[Line], key_of: Callable[[Line], bytes]) -> LineIndex:
    """Return the index of the lines of a file that are not blank."""
    numbers, starts, keys = array("q"), array("q"), bytearray()
    for line in lines:
        if not line.text.isspace():
            numbers.append(line.number)
            starts.append(line.start)
            keys += key_of(line)
    return LineIndex(
        path,
        np.frombuffer(numbers, dtype=np.int64),
        np.frombuffer(starts, dtype=np.int64),
        np.frombuffer(keys, dtype=f"S{KEY_BYTES}"),
    )
