"""The loops of kernels: how the outer one runs, how the inner ones cut rows into vectors."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

LANES = 16  # float32 or int32 values in one 512-bit vector; other targets split it
PARALLEL_FROM_US = 10.0  # a launch costs 1 us while a worker spins, a few more where one must be woken


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def largest_divisor(value: int, most: int) -> int:
    """Return the largest divisor of ``value`` that is at most ``most``."""
    return max(divisor for divisor in range(1, most + 1) if value % divisor == 0)


def loop_over(extent: int, work_us: float) -> Any:
    """Open the outer loop of a kernel: in parallel if it has turns to share and ``work_us`` on one thread pays."""
    return T.parallel(extent) if extent > 1 and work_us >= PARALLEL_FROM_US else T.serial(extent)


def each_vector(columns: int, emit: Callable[[Any, Callable[[Any], Any]], None]) -> None:
    """Emit code for each 16 neighbouring columns, then for each of the rest.

    Args:
        emit: called with an index, of a vector or one column, and what repeats a scalar for it.
    """
    whole, rest = divmod(columns, LANES)
    if whole:
        with T.serial(whole) as step:
            emit(T.ramp(step * LANES, 1, LANES), lambda value: T.broadcast(value, LANES))
    if rest:
        with T.serial(rest) as i:
            emit(whole * LANES + i, lambda value: value)
