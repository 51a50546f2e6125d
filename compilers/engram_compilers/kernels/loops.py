"""Decide how a kernel's outer loop runs, and round sizes up to whole vectors."""

from typing import Any

from tvm.script import tirx as T

LANES = 16  # float32 or int32 values in one 512-bit vector; other targets split it
PARALLEL_FROM_US = 10.0  # a launch costs 1 us while a worker spins, a few more where one must be woken


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def loop_over(extent: int, work_us: float) -> Any:
    """Open the outer loop of a kernel: in parallel if ``work_us`` on one thread is worth it, else serial."""
    return T.parallel(extent) if work_us >= PARALLEL_FROM_US else T.serial(extent)
