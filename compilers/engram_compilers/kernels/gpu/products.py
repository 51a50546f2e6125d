"""Sums of products of int8 weights and activation planes, over blocks of 32 outputs and 8 parts of the inputs.

Thread (x, y) of a block has output x of the block's tile and every eighth chunk of its inputs from chunk y on, for up
to four rows of activations. The parts are then summed over shared memory: integers in any order, float32 ascending.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import LANES, quads
from engram_compilers.kernels.gpu.packing import TILE
from engram_compilers.kernels.intrinsics import Expr

PARTS = 8  # of the inputs, a row of threads each
MOST_ROWS = 4  # of activations that share each load of a weight


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thread is.

    Attributes:
        tile: of 32 outputs.
        first_row: of the block's rows of activations; ``count`` are how many.
        lane: the output in the tile.
        part: of the inputs.
    """

    tile: Expr
    first_row: Expr
    count: int
    lane: Expr
    part: Expr

    @property
    def output(self) -> Expr:
        return self.tile * TILE + self.lane


def zeros(count: int, dtype: str) -> Expr:
    """Return ``count`` sums of a thread's own."""
    sums = blocks.local(count, dtype)
    with T.serial(count) as index:
        T.buffer_store(sums, T.int32(0) if dtype == "int32" else T.float32(0.0), [index])
    return sums


def add_products(sums: Expr, first: int, weights: Expr, activations: Expr) -> None:
    """Add the products of four weights, int32x4, and four activations, int8x4, to four sums from ``first`` on."""
    place = quads(first * LANES)
    T.buffer_store(sums, sums[place] + weights * T.cast(activations, f"int32x{LANES}"), [place])


def four_sums(sums: Expr, index: int) -> Expr:
    """Return the sum of four sums."""
    first, second, third, fourth = (sums[index * LANES + lane] for lane in range(LANES))
    return (first + second) + (third + fourth)


def each_chunk(count: int, part: Expr, emit: Callable[[Expr], None]) -> None:
    """Emit for each of a thread's chunks of the inputs, ascending."""
    with T.serial(-(-count // PARTS)) as step:
        chunk = T.Bind(step * PARTS + part)
        if count % PARTS == 0:
            emit(chunk)
        else:
            with T.If(chunk < count), T.Then():
                emit(chunk)


def finish(place: Place, sums: Sequence[Expr], dtype: str, store: Callable[[Expr, Sequence[Expr]], None]) -> None:
    """Add up the parts of each row; ``store(row of the block, its sums)`` is emitted for the thread that has them.

    Args:
        sums: of each row in turn, ``len(sums) / place.count`` each.
    """
    each = len(sums) // place.count
    parts = blocks.shared((len(sums), PARTS, TILE), dtype)
    for index, value in enumerate(sums):
        T.buffer_store(parts, value, [index, place.part, place.lane])
    blocks.synchronise()
    for row in range(place.count):
        with T.If(place.part == row), T.Then():
            totals = []
            for index in range(row * each, (row + 1) * each):
                total = parts[index, 0, place.lane]
                for part in range(1, PARTS):
                    total = total + parts[index, part, place.lane]
                totals.append(T.Bind(total))
            store(place.first_row + row, totals)
