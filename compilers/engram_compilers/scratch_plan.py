"""Places for the buffers of a straight-line program, in as little memory as a first fit needs."""

from collections.abc import Iterable
from dataclasses import dataclass

from engram_runtime.executor import ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer's size, and the calls that are the first and the last one to touch it."""

    bytes: int
    first: int
    last: int


def plan_scratch(lifetimes: Iterable[Lifetime], alignment: int = ALIGNMENT_BYTES) -> tuple[list[int], int]:
    """Return the offset of each buffer, a multiple of ``alignment`` bytes, and the bytes of all.

    Buffers overlap only where one's last call comes before the other's first one.

    Args:
        lifetimes: by first call, ascending.
    """
    offsets: list[int] = []
    live: list[tuple[int, int, int]] = []  # (offset, end, last call), ascending
    most = 0
    for buffer in lifetimes:
        live = [held for held in live if held[2] >= buffer.first]
        offset = _first_gap(live, buffer.bytes, alignment)
        live = sorted([*live, (offset, offset + buffer.bytes, buffer.last)])
        offsets.append(offset)
        most = max(most, _aligned(offset + buffer.bytes, alignment))
    return offsets, most


def _first_gap(live: Iterable[tuple[int, int, int]], size: int, alignment: int) -> int:
    start = 0
    for offset, end, _ in live:
        if offset - start >= size:
            return start
        start = max(start, _aligned(end, alignment))
    return start


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
