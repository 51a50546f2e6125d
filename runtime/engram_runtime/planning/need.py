"""What running a model takes in memory, and whether a machine has it."""

from collections.abc import Mapping
from dataclasses import dataclass

from engram_runtime.planning.outline import EMBEDDING, EXPERTS, ROTATIONS, Outline
from engram_runtime.sizes import format_size

# Python, numpy and TVM's runtime with its buffers, and the pages of their code: what `engram bench` found of three
# bundles, weights, caches and tables taken off.
OWN_BYTES, CODE_BYTES = 42_000_000, 31_000_000
FITS, FROM_DISK, WONT_FIT, TABLES_ONLY = "fits", "experts from disk", "won't fit", "tables only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes by what takes them; ``experts`` alone may stay on the disk."""

    program: int
    weights: int
    experts: int
    caches: int
    states: int
    tables: int

    @property
    def least(self) -> int:
        """Bytes without experts."""
        return self.program + self.weights + self.caches + self.states + self.tables

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.least + self.experts

    def rows(self) -> Mapping[str, int]:
        """Return the bytes by words for them."""
        found = {
            "program and libraries": self.program,
            "weights but experts": self.weights,
            "experts": self.experts,
            "caches": self.caches,
            "states": self.states,
            "resident tables": self.tables,
        }
        return {words: size for words, size in found.items() if size}


def memory_need(outline: Outline, positions: int, resident_bytes: int) -> Need:
    """Return what a text of so many positions takes beside resident tables."""
    return Need(
        program=OWN_BYTES + CODE_BYTES,
        weights=outline.whole_bytes + outline.packed(EMBEDDING, ROTATIONS),
        experts=outline.packed(EXPERTS),
        caches=outline.cache_bytes(positions),
        states=outline.state_bytes,
        tables=resident_bytes,
    )


def experts_on_disk(need: Need, memory_bytes: int) -> float:
    """Return the share of experts that memory has no room for."""
    if not need.experts:
        return 0.0
    return min(max(need.total - memory_bytes, 0) / need.experts, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``kind`` is `FITS`, `FROM_DISK`, `WONT_FIT` or `TABLES_ONLY`; ``reason`` says why in a sentence."""

    kind: str
    reason: str


def judge_memory(need: Need, memory_bytes: int, rate: float | None) -> Verdict:
    """Say whether it fits; ``rate`` are tokens a second with the experts where they have to be, None if unknown."""
    room = format_size(memory_bytes)
    if need.least > memory_bytes:
        beside = " beside the experts" if need.experts else ""
        return Verdict(kind=WONT_FIT, reason=f"it takes {format_size(need.least)} of memory{beside}, there are {room}")
    if need.total <= memory_bytes:
        return Verdict(kind=FITS, reason=f"it takes {format_size(need.total)} of {room}")
    share = experts_on_disk(need, memory_bytes)
    speed = "at a rate unknown, as the disk is" if rate is None else f"at best {rate:.2g} tok/s"
    return Verdict(
        kind=FROM_DISK,
        reason=f"{share:.0%} of the experts don't fit in {room} and are read from the disk for every token: {speed}",
    )
