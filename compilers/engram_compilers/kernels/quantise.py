# mypy: disable-error-code="valid-type, untyped-decorator"
"""Quantise activation rows to 16 bits, kept as two planes of int8.

With s = max|x| / 32639 a row is v = nearbyint(x / s), |v| <= 32639 = 127*256 + 127, and v = 256*hi + lo with
hi in -127..127 and lo in -128..127: two rows for an 8-bit dot product, 16 bits of activation.
"""

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, lane_max, lane_sum, lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.packing import INT8_BIAS

LARGEST = 32639  # 127*256 + 127
SMALLEST_PEAK = np.float32(1e-30)  # rows below quantise to zeros
PLANE_MULTIPLE = 64  # bytes in a vector: planes are padded to it with zeros

_SMALLEST_PEAK_BITS = int(SMALLEST_PEAK.view(np.int32))
_VALUES_PER_US = 5000.0


def quantise_rows_numpy(
    x: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
    """State what `quantise_rows` computes, bit for bit, for finite ``x [M, K]``.

    Returns:
        planes ``[2M, Kp]`` int8, row_scale ``[M]`` float32, plane_offset ``[2M]`` int32.
    """
    rows, columns = x.shape
    peak = np.maximum(np.abs(x).max(axis=1), SMALLEST_PEAK)
    value = np.rint(x * (np.float32(LARGEST) / peak)[:, None]).astype(np.int32)
    high = (value + 128) >> 8
    planes = np.zeros((2 * rows, round_up(columns, PLANE_MULTIPLE)), np.int8)
    planes[:rows, :columns] = high
    planes[rows:, :columns] = value - 256 * high
    plane_offset = -INT8_BIAS * planes.sum(axis=1, dtype=np.int32)
    return planes, peak / np.float32(LARGEST), plane_offset


def _magnitude_bits(x: Expr) -> Expr:
    """Return |x| as int32x16 bits: they order like the values, and a NaN is larger than all."""
    return T.bitwise_and(T.reinterpret("int32x16", x), splat(0x7FFFFFFF))


def _quantised(x: Expr, factor: Expr) -> Expr:
    """Return nearbyint(x * factor) as int32x16; the clamp only gives NaN and Inf a defined value."""
    scaled = T.min(T.max(T.nearbyint(x * splat(factor)), splat(-float(LARGEST))), splat(float(LARGEST)))
    return T.cast(scaled, "int32x16")


def _store_planes(planes: Expr, sums: Expr, rows: int, row: Expr, column: Expr, value: Expr) -> None:
    """Split 16 quantised values into the two planes and add each plane to its sum."""
    value = T.Bind(value)
    high = T.Bind(T.shift_right(value + splat(128), splat(8)))
    low = T.Bind(value - T.shift_left(high, splat(8)))
    for plane, part in enumerate((high, low)):
        T.buffer_store(planes, T.cast(part, "int8x16"), [plane * rows + row, lanes(column)])
        T.buffer_store(sums, sums[plane, lanes(0)] + part, [plane, lanes(0)])


def quantise_rows(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, K]) -> planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M]``.

    Kp is K rounded up to 64, padded with zeros. High planes are rows 0..M-1, low planes M..2M-1.
    ``plane_offset[p] = -128 * sum(planes[p])`` cancels the bias of packed weights.
    A row with a NaN or Inf gets a NaN or Inf row_scale. Integer sums: no order to keep.
    """
    padded = round_up(columns, PLANE_MULTIPLE)
    whole, rest = divmod(columns, LANES)
    empty = padded // LANES - whole - (rest > 0)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, columns), "float32"),
        planes: T.Buffer((2 * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _VALUES_PER_US):
                edge = T.alloc_local((LANES,), "float32")  # the last, incomplete vector of the row
                peak = T.alloc_local((LANES,), "int32")
                sums = T.alloc_local((2, LANES), "int32")

                peak[lanes(0)] = splat(_SMALLEST_PEAK_BITS)
                for step in T.serial(whole):
                    peak[lanes(0)] = T.max(peak[lanes(0)], _magnitude_bits(x[row, lanes(step * LANES)]))
                if rest > 0:
                    edge[lanes(0)] = splat(0.0)
                    for i in T.serial(rest):
                        edge[i] = x[row, whole * LANES + i]
                    peak[lanes(0)] = T.max(peak[lanes(0)], _magnitude_bits(edge[lanes(0)]))
                row_peak: T.let = T.reinterpret("float32", lane_max(peak[lanes(0)]))
                factor: T.let = T.float32(LARGEST) / row_peak
                row_scale[row] = row_peak / T.float32(LARGEST)

                for plane in T.unroll(2):
                    sums[plane, lanes(0)] = splat(0)
                for step in T.serial(whole):
                    _store_planes(
                        planes, sums, rows, row, step * LANES, _quantised(x[row, lanes(step * LANES)], factor)
                    )
                if rest > 0:
                    _store_planes(planes, sums, rows, row, whole * LANES, _quantised(edge[lanes(0)], factor))
                for step in T.unroll(empty):
                    for plane in T.unroll(2):
                        planes[plane * rows + row, lanes(padded - (step + 1) * LANES)] = T.broadcast(T.int8(0), LANES)
                for plane in T.unroll(2):
                    plane_offset[plane * rows + row] = lane_sum(sums[plane, lanes(0)]) * -INT8_BIAS

    return kernel
