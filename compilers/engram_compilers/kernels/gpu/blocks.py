"""Blocks of threads: what their kernels are written with, and the fixed order in which they sum.

`THREADS` threads share a row. Thread t takes columns t, t + 128, t + 256, ... ascending; what the threads have is
combined in a tree over shared memory: thread t takes that of t + 64, then of t + 32, ..., of t + 1. It needs no
instruction of warps, so all three languages have it, and its order depends on nothing but the number of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr

THREADS = 128  # of a block that shares a row
LANES = 4  # int8 values loaded at once: vectors that all three languages have

ATTRIBUTES = {"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True}


def blocks(count: int, axis: str = "x") -> Any:
    """Open the loop over blocks of threads."""
    return T.thread_binding(count, thread=f"blockIdx.{axis}")


def threads(count: int = THREADS, axis: str = "x") -> Any:
    """Open the loop over the threads of a block."""
    return T.thread_binding(count, thread=f"threadIdx.{axis}")


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """Return a*b + c with one rounding, of float32; all three languages have it by this name."""
    return T.call_pure_extern("float32", "fma", a, b, c)


def rounded(x: Expr) -> Expr:
    """Return the nearest whole float32, the even one of two."""
    return T.call_pure_extern("float32", "rint", x)


def quads(start: Expr) -> Expr:
    """Index `LANES` neighbouring elements from ``start``."""
    return T.ramp(start, 1, LANES)


def local(count: int, dtype: str) -> Expr:
    """Allocate memory of each thread's own."""
    return T.alloc_buffer((count,), dtype, scope="local")


def shared(shape: Sequence[int], dtype: str) -> Expr:
    """Allocate memory of a block."""
    return T.alloc_buffer(tuple(shape), dtype, scope="shared")


def synchronise() -> None:
    """Wait for all threads of the block; what they have written to shared memory is then seen by all."""
    T.evaluate(T.tvm_storage_sync("shared"))


def combined(value: Expr, thread: Expr, combine: Callable[[Expr, Expr], Expr], count: int = THREADS) -> Expr:
    """Return what ``count`` threads, a power of two, have, combined in the tree, to all of them."""
    parts = shared((count,), value.ty.dtype)
    T.buffer_store(parts, value, [thread])
    synchronise()
    stride = count // 2
    while stride:
        with T.If(thread < stride), T.Then():
            T.buffer_store(parts, combine(parts[thread], parts[thread + stride]), [thread])
        synchronise()
        stride //= 2
    result = local(1, value.ty.dtype)
    T.buffer_store(result, parts[0], [0])
    synchronise()  # or the next one's writes could come before this one's reads
    return result[0]


def added(value: Expr, thread: Expr, count: int = THREADS) -> Expr:
    """Return the sum of what threads have, in the tree."""
    return combined(value, thread, lambda a, b: a + b, count)


def steps(columns: int, count: int = THREADS) -> int:
    """Return how many columns of a row a thread has at most."""
    return -(-columns // count)


@contextmanager
def own_columns(columns: int, thread: Expr, count: int = THREADS) -> Iterator[tuple[Expr, Expr]]:
    """Emit what follows for each column of a thread: its place among them, and the column."""
    with T.serial(steps(columns, count)) as step:
        column = T.Bind(step * count + thread)
        if columns % count == 0:
            yield step, column
            return
        with T.If(column < columns), T.Then():
            yield step, column


def own_values(columns: int, thread: Expr, load: Callable[[Expr], Expr]) -> Expr:
    """Return a thread's values of a row, `local` float32, from ``load(column)``."""
    values = local(steps(columns), "float32")
    with own_columns(columns, thread) as (step, column):
        T.buffer_store(values, load(column), [step])
    return values
