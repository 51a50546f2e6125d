"""What the tiled kernels ask of an instruction set; all else about them is the same on every machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, round_up
from engram_compilers.kernels.matrix_layout import MATRICES
from engram_compilers.kernels.vnni_layout import DOTS, OCTET, STEP, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class DotIsa:
    """An instruction set with a dot product of four bytes: a sum is of a plane row and the 16 outputs of a tile.

    Attributes:
        dot4: (total int32x16, weights uint8x64, activations int8x64) -> total[i] + sum_b weights[4i+b] *
            activations[4i+b], exact. It takes the weights' bytes as its instruction does.
        weight_bias: what an int8 weight's byte is above its value: 128 where instructions take unsigned bytes,
            0 where they take signed ones.
        sums: sums of 16 lanes that fit the registers, beside weights and activations.
        layout: how packed weights lie in memory.
    """

    dot4: Callable[[Expr, Expr, Expr], Expr]
    weight_bias: int
    sums: int
    layout: Layout = field(default=DOTS, init=False)

    def sums_of(self, plane_rows: int) -> int:
        """Return how many sums the products of so many plane rows and a tile take."""
        return plane_rows

    def new_sums(self, first: Sequence[Expr]) -> list[Expr]:
        """Allocate the sums of a tile and some plane rows, each row's starting at a number."""
        return [_filled(splat(value)) for value in first]

    def add_products(
        self, sums: Sequence[Expr], planes: Expr, plane_rows: Sequence[Expr], octet: Expr, part: int, weights: Expr
    ) -> None:
        """Add the products of a vector of weights, which is a part of an octet, to the sums of a tile."""
        for total, row in zip(sums, plane_rows, strict=True):
            four = T.reinterpret("int32", planes[row, lanes(octet * OCTET + part * STEP, STEP)])
            activations = T.Bind(T.reinterpret("int8x64", T.broadcast(four, LANES)))
            T.buffer_store(total, self.dot4(total[lanes(0)], weights, activations), [lanes(0)])

    def plane_sum(self, sums: Sequence[Expr], index: int) -> Expr:
        """Return int32x16: what plane row ``index`` has summed."""
        return sums[index][lanes(0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixIsa:
    """An instruction set that multiplies matrices, two outputs by two plane rows, eight inputs each.

    Lane 2i + j of a sum is output i of 8 and the j-th of two plane rows. An odd plane row is multiplied with itself.

    Attributes:
        multiply: (total int32x16, weights uint8x64, activations int8x16) -> total[2i+j] + sum_b weights[8i+b] *
            activations[8j+b], exact.
        weight_bias, sums, layout: see `DotIsa`.
    """

    multiply: Callable[[Expr, Expr, Expr], Expr]
    weight_bias: int
    sums: int
    layout: Layout = field(default=MATRICES, init=False)

    def sums_of(self, plane_rows: int) -> int:
        """See `DotIsa.sums_of`."""
        return round_up(plane_rows, 2)

    def new_sums(self, first: Sequence[Expr]) -> list[Expr]:
        """See `DotIsa.new_sums`."""
        both = [T.Shuffle([splat(a), splat(b)], [0, LANES] * (LANES // 2)) for a, b in _in_twos(first)]
        return [_filled(value) for value in both for _ in range(2)]

    def add_products(
        self, sums: Sequence[Expr], planes: Expr, plane_rows: Sequence[Expr], octet: Expr, part: int, weights: Expr
    ) -> None:
        """See `DotIsa.add_products`."""
        for total, rows in zip(sums[part::2], _in_twos(plane_rows), strict=True):
            eights = [planes[row, lanes(octet * OCTET, OCTET)] for row in rows]
            activations = T.Bind(T.Shuffle(eights, list(range(2 * OCTET))))
            T.buffer_store(total, self.multiply(total[lanes(0)], weights, activations), [lanes(0)])

    def plane_sum(self, sums: Sequence[Expr], index: int) -> Expr:
        """See `DotIsa.plane_sum`."""
        first = index - index % 2
        both = [part[lanes(0)] for part in sums[first : first + 2]]
        return T.Shuffle(both, [2 * output + index % 2 for output in range(LANES)])


Isa = DotIsa | MatrixIsa


def _filled(value: Expr) -> Expr:
    total = new_lanes("int32")
    T.buffer_store(total, value, [lanes(0)])
    return total


def _in_twos(values: Sequence[Expr]) -> list[tuple[Expr, Expr]]:
    """Return neighbours in pairs, the last of an odd number with itself."""
    return list(zip(values[::2], [*values[1::2], *values[-1:]], strict=False))
