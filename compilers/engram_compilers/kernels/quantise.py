# mypy: disable-error-code="valid-type, untyped-decorator"
"""Quantise activation rows to 8 bits, or to 16 bits kept as two planes of int8.

One plane: s = max|x| / 127, v = nearbyint(x / s). Two planes: with s = max|x| / 32639 a row is v = nearbyint(x / s),
|v| <= 32639 = 127*256 + 127, and v = 256*hi + lo with hi in -127..127 and lo in -128..127: two rows for an 8-bit dot
product, 16 bits of activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, converted, fma, lane_max, lane_sum, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, each_vector, loop_over, round_up
from engram_compilers.kernels.packing import INT8_BIAS

LARGEST = {1: 127, 2: 32639}  # by the number of planes; 32639 = 127*256 + 127
SMALLEST_PEAK = np.float32(1e-30)  # rows below quantise to zeros
MOST_PLANES = 2
PLANE_MULTIPLE = 64  # bytes in a vector: planes are padded to it with zeros

_SMALLEST_PEAK_BITS = int(SMALLEST_PEAK.view(np.int32))
_VALUES_PER_US = 5000.0


def quantise_rows_numpy(
    x: NDArray[np.float32], planes: int
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
    """State what `quantise_rows` computes, bit for bit, for finite ``x [M, K]``.

    Returns:
        planes ``[P * M, Kp]`` int8, row_scale ``[M]`` float32, plane_offset ``[P * M]`` int32.
    """
    rows, columns = x.shape
    largest = np.float32(LARGEST[planes])
    peak = np.maximum(np.abs(x).max(axis=1), SMALLEST_PEAK)
    value = np.rint(x * (largest / peak)[:, None]).astype(np.int32)
    high = (value + 128) >> 8
    parts = [value] if planes == 1 else [high, value - 256 * high]
    made = np.zeros((planes * rows, round_up(columns, PLANE_MULTIPLE)), np.int8)
    made[:, :columns] = np.concatenate(parts)
    plane_offset = -INT8_BIAS * made.sum(axis=1, dtype=np.int32)
    return made, peak / largest, plane_offset


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedRows:
    """What a kernel that quantises M rows of K writes, as buffers.

    Attributes:
        planes: i8 ``[P * M, Kp]``: Kp is K rounded up to 64, padded with zeros. With two planes the high ones are
            rows 0..M-1, the low ones M..2M-1.
        row_scale: f32 ``[M]``; NaN or Inf for a row that has one.
        plane_offset: i32 ``[P * M]``, -128 * sum of the plane, which cancels the bias of packed weights.
    """

    planes: Expr
    row_scale: Expr
    plane_offset: Expr

    @property
    def rows(self) -> int:
        return int(self.row_scale.shape[0])

    @property
    def count(self) -> int:
        """Planes of a row."""
        return int(self.planes.shape[0]) // self.rows

    def store(self, row: Expr, values: Expr) -> None:
        """Emit the quantisation of ``values f32 [Kp]``, zeros after the last column. Integer sums have no order."""
        largest = LARGEST[self.count]
        row_peak = T.Bind(_peak(values))
        factor = T.Bind(T.float32(largest) / row_peak)
        T.buffer_store(self.row_scale, row_peak / T.float32(largest), [row])
        sums = T.alloc_buffer((self.count, LANES), "int32")
        for plane in range(self.count):
            T.buffer_store(sums, splat(0), [plane, lanes(0)])
        with T.serial(int(values.shape[0]) // LANES) as step:
            for plane, part in enumerate(self._parts(values[lanes(step * LANES)], factor)):
                place = [plane * self.rows + row, lanes(step * LANES)]
                T.buffer_store(self.planes, T.cast(part, "int8x16"), place)
                T.buffer_store(sums, sums[plane, lanes(0)] + part, [plane, lanes(0)])
        for plane in range(self.count):
            total = lane_sum(sums[plane, lanes(0)]) * -INT8_BIAS
            T.buffer_store(self.plane_offset, total, [plane * self.rows + row])

    def _parts(self, x: Expr, factor: Expr) -> Sequence[Expr]:
        """Return 16 values' parts for each plane as int32x16; the clamp only gives NaN and Inf a defined value."""
        largest = float(LARGEST[self.count])
        scaled = T.min(T.max(T.nearbyint(x * splat(factor)), splat(-largest)), splat(largest))
        value = T.Bind(T.cast(scaled, "int32x16"))
        if self.count == 1:
            return [value]
        high = T.Bind(T.shift_right(value + splat(128), splat(8)))
        return [high, T.Bind(value - T.shift_left(high, splat(8)))]


def _peak(values: Expr) -> Expr:
    """Return max|x| of a row, by bits: they order like the values, and a NaN is larger than all."""
    peak = new_lanes("int32")
    T.buffer_store(peak, splat(_SMALLEST_PEAK_BITS), [lanes(0)])
    with T.serial(int(values.shape[0]) // LANES) as step:
        bits = T.reinterpret("int32x16", values[lanes(step * LANES)])
        magnitude = T.bitwise_and(bits, splat(0x7FFFFFFF))
        T.buffer_store(peak, T.max(peak[lanes(0)], magnitude), [lanes(0)])
    return T.reinterpret("float32", lane_max(peak[lanes(0)]))


def padded_row(columns: int) -> Expr:
    """Return a local row f32 [Kp] with zeros after ``columns``; those before are to be filled."""
    padded = round_up(columns, PLANE_MULTIPLE)
    values = T.alloc_local((padded,), "float32")
    for start in range(columns // LANES * LANES, padded, LANES):
        T.buffer_store(values, splat(0.0), [lanes(start)])
    return values


def row_of(x: Expr, row: Expr) -> Expr:
    """Return a `padded_row` with the values of a row of ``x``."""
    columns = int(x.shape[1])
    values = padded_row(columns)
    each_vector(columns, lambda index, _: T.buffer_store(values, x[row, index], [index]))
    return values


def joined(sums: Sequence[Expr]) -> Expr:
    """Return f32(S) of the int32 sums of one plane, 256 * f32(H) + f32(L) of two: a scalar or 16 lanes.

    The product is exact, so there is one rounding.
    """
    count = sums[0].ty.dtype.lanes
    *high, low = (converted(part, "float32", count) for part in sums)
    return fma(high[0], T.float32(256.0) if count == 1 else splat(256.0, count), low) if high else low


def quantised_types(rows: int, columns: int, planes: int) -> list[tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes of `QuantisedRows`, in the order kernels take them."""
    padded = round_up(columns, PLANE_MULTIPLE)
    return [((planes * rows, padded), "int8"), ((rows,), "float32"), ((planes * rows,), "int32")]


def quantise_rows(rows: int, columns: int, planes: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, K]) -> planes i8 [P * M, Kp], row_scale f32 [M], plane_offset i32 [P * M]``.

    The results are `QuantisedRows`.
    """
    padded = round_up(columns, PLANE_MULTIPLE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, columns), "float32"),
        planes_: T.Buffer((planes * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((planes * rows,), "int32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _VALUES_PER_US):
                QuantisedRows(planes_, row_scale, plane_offset).store(row, row_of(x, row))

    return kernel
