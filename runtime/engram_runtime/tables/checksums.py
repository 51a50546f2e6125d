"""Checksums of a table's files, a block at a time: a row from a damaged disk is an error and never a wrong row.

CRC-32, as zlib has it, of each 4 KiB of a file, counted from its first byte; the last block is what is left. One bit,
and any burst of up to 32, always changes it. It is no proof against intent: digests and signatures are for that.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.table_spec import CHECKSUM_BLOCK_BYTES, TableSpec

READ_BYTES = 8 << 20  # at a time: whole blocks
Checksums = Mapping[str, NDArray[np.uint32]]  # of each block, by the file of a row range
UNCHECKED: Checksums = {}


@dataclass(frozen=True, slots=True)
class WrongBlock:
    """A block that isn't what was written: its number, and both checksums."""

    number: int
    found: int
    expected: int


def read_checksums(bundle: Bundle, spec: TableSpec) -> Checksums:
    """Read the checksums of a table's files; files outside the bundle, and those of version 2, have none.

    Raises:
        BundleError: a file of checksums is damaged.
    """
    paths = {rows.file: rows.checksums for rows in spec.ranges if rows.checksums is not None}
    return {file: np.frombuffer(bundle.read_checked(path), dtype="<u4") for file, path in paths.items()}


def find_wrong_block(data: memoryview, expected: Sequence[int], first: int) -> WrongBlock | None:
    """Hold whole blocks of a file, the last one of which may be shorter, against what they should be.

    Args:
        expected: a checksum for each.
        first: number of the first one.
    """
    for place, checksum in enumerate(expected):
        begin = place * CHECKSUM_BLOCK_BYTES
        if (found := zlib.crc32(data[begin : begin + CHECKSUM_BLOCK_BYTES])) != checksum:
            return WrongBlock(first + place, found, checksum)
    return None


def write_checksums(path: Path, out: Path) -> None:
    """Write the checksums of a file, little-endian uint32."""
    with path.open("rb") as file, out.open("wb") as checksums:
        while data := file.read(READ_BYTES):
            checksums.write(np.fromiter(_checksums(memoryview(data)), dtype="<u4").tobytes())


def _checksums(data: memoryview) -> Iterator[int]:
    for begin in range(0, len(data), CHECKSUM_BLOCK_BYTES):
        yield zlib.crc32(data[begin : begin + CHECKSUM_BLOCK_BYTES])
