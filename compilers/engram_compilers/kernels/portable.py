# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers for any machine LLVM knows: weights row by row, one output after the other.

The functions, arguments and results are those of the tiled families, bit for bit; only the packed layout differs.
Sums of products are integers, exact in any order.
"""

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, fma, lane_sum, lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.packing import (
    BLOCK_BIAS,
    GROUP,
    INT8_BIAS,
    Arrays,
    Bytes,
    int4_header,
    pad,
    require_bits,
    require_groups,
    require_indexable,
)
from engram_compilers.kernels.quantise import MOST_PLANES, PLANE_MULTIPLE, joined

_PRODUCTS_PER_US = 10_000.0  # of a weight and an 8-bit activation
_EMBEDDED_PER_US = 2000.0


def pack_int8(weight: Bytes) -> Arrays:
    """Pack weights stored as value + 128, ``[N, K]``, for `linear_int8` and `embed_int8`.

    Returns:
        weight: ``[N, Kp]``, K rounded up to 64.
    """
    return {"weight": pad(weight, 1, PLANE_MULTIPLE, INT8_BIAS)}


def pack_int4(codes: Bytes, multiplier: Bytes, zero: Bytes) -> Arrays:
    """Pack ``codes [N, K]`` 0..15 with ``multiplier`` 1..16 and ``zero`` 0..15 ``[N, K/32]`` for `linear_int4`.

    Returns:
        codes: ``[N, Kp/2]``; byte i of a group's 16 holds inputs i (low nibble) and 16 + i (high nibble).
        header: ``[N, Kp/32]``, (multiplier - 1) | zero << 4.

    Raises:
        CompileError: K is not a multiple of 32, or a group's weights do not fit int8.
    """
    require_groups(codes.shape[1])
    header = pad(int4_header(multiplier, zero), 1, PLANE_MULTIPLE // GROUP)
    return {"codes": _nibbles(pad(codes, 1, PLANE_MULTIPLE)), "header": header}


def pack_block(codes: Bytes, block_scale: NDArray[np.float32], bits: int) -> Arrays:
    """Pack Q4_0 or Q8_0 ``codes [N, K]`` (value + 8 or 128) with ``block_scale [N, K/32]`` for `linear_block`.

    Returns:
        codes: as `pack_int4` (4 bits) or `pack_int8` (8 bits) lay them out.
        block_scale: float32 ``[N, Kp/32]``.
    """
    require_bits(bits)
    require_groups(codes.shape[1])
    padded = pad(codes, 1, PLANE_MULTIPLE, BLOCK_BIAS[bits])
    scale = pad(block_scale, 1, PLANE_MULTIPLE // GROUP)
    return {"codes": _nibbles(padded) if bits == 4 else padded, "block_scale": scale}


def _nibbles(codes: Bytes) -> Bytes:
    """[N, K] -> [N, K/2]: the two halves of a group of 32 in the low and high nibbles."""
    outputs, inputs = codes.shape
    grouped = codes.reshape(outputs, inputs // GROUP, 2, GROUP // 2)
    return (grouped[:, :, 0] | (grouped[:, :, 1] << np.uint8(4))).reshape(outputs, inputs // 2)


def widened(values: Expr) -> Expr:
    """Return 16 integers as int32x16."""
    return T.cast(values, "int32x16")


def _halves(codes: Expr, bits: int, output: Expr, group: Expr) -> tuple[Expr, Expr]:
    """Return the lower and the upper 16 codes of a group as int32x16."""
    if bits == 8:
        return widened(codes[output, lanes(group * GROUP)]), widened(codes[output, lanes(group * GROUP + LANES)])
    both = T.Bind(codes[output, lanes(group * LANES)])
    low = T.bitwise_and(both, T.broadcast(T.uint8(15), LANES))
    return widened(low), widened(T.shift_right(both, T.broadcast(T.uint8(4), LANES)))


def unpack_int4(weight: Expr, codes: Expr, header: Expr, output: Expr, group: Expr) -> None:
    """Write (code - zero) * multiplier of a group to a row of int8 weights."""
    multiplier = T.Bind(T.cast(T.bitwise_and(header, T.uint8(15)), "int32") + 1)
    zero = T.Bind(T.cast(T.shift_right(header, T.uint8(4)), "int32"))
    for half, part in enumerate(_halves(codes, 4, output, group)):
        value = (part - splat(zero)) * splat(multiplier)
        T.buffer_store(weight, T.cast(value, "int8x16"), [lanes(group * GROUP + half * LANES)])


def add_products(sums: Expr, weights: Expr, planes: Expr, rows: int, row: Expr, column: Expr) -> None:
    """Add weights * activations of 16 inputs to the sums of all planes, int32 [P, 16]."""
    weights = T.Bind(weights)
    for plane in range(int(sums.shape[0])):
        activations = widened(planes[plane * rows + row, lanes(column)])
        T.buffer_store(sums, sums[plane, lanes(0)] + weights * activations, [plane, lanes(0)])


def new_sums(planes: int) -> Expr:
    """Return a buffer int32 [P, 16] of zeros: a plane's sums a row."""
    sums = T.alloc_buffer((planes, LANES), "int32")
    for plane in range(planes):
        T.buffer_store(sums, splat(0), [plane, lanes(0)])
    return sums


def _add_block(
    sums: Expr, codes: Expr, bits: int, planes: Expr, rows: int, row: Expr, output: Expr, group: Expr
) -> None:
    """Add (code - bias) * activations of a group to both planes' sums."""
    for half, part in enumerate(_halves(codes, bits, output, group)):
        add_products(sums, part - splat(BLOCK_BIAS[bits]), planes, rows, row, group * GROUP + half * LANES)


def add_offsets(sums: Expr, plane_offset: Expr, rows: int, row: Expr) -> None:
    """Add the offset of each plane of a row to its sums."""
    for plane in range(int(sums.shape[0])):
        T.buffer_store(sums, sums[plane, 0] + plane_offset[plane * rows + row], [plane, 0])


def plane_sums(sums: Expr) -> list[Expr]:
    """Return what the lanes of each plane sum to, int32."""
    return [lane_sum(sums[plane, lanes(0)]) for plane in range(int(sums.shape[0]))]


def work_us(rows: int, out_features: int, in_features: int, planes: int) -> float:
    """Estimate a linear layer's time on one thread."""
    return planes * rows * out_features * in_features / _PRODUCTS_PER_US


def linear_int8(rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build the linear layer on int8 weights, packed as `pack_int8` returns them; ``planes`` (P) is 1 or 2.

    ``(planes i8 [P*M, Kp], row_scale f32 [M], plane_offset i32 [P*M], weight u8 [N, Kp], channel_scale f32 [N])
    -> y f32 [M, N]``:
    y[m, n] = (f32(S) * channel_scale[n]) * row_scale[m] of one plane, ((256 * f32(H) + f32(L)) * channel_scale[n]) *
    row_scale[m] of two. S, or H of the high and L of the low plane, are the int32 sums
    plane_offset[p] + sum_k planes[p, k] * weight[n, k].
    """
    padded, count = round_up(in_features, PLANE_MULTIPLE), planes
    require_indexable("the weight", out_features, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((count * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((count * rows,), "int32"),
        weight: T.Buffer((out_features, padded), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for output in loop_over(out_features, work_us(rows, out_features, in_features, count)):
                for row in T.serial(rows):
                    sums = new_sums(count)
                    for step in T.serial(padded // LANES):
                        add_products(
                            sums, widened(weight[output, lanes(step * LANES)]), planes, rows, row, step * LANES
                        )
                    add_offsets(sums, plane_offset, rows, row)
                    y[row, output] = joined(plane_sums(sums)) * channel_scale[output] * row_scale[row]

    return kernel


def linear_int4(rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build `linear_int8` for two-level int4 weights, packed as `pack_int4` returns them.

    ``(planes i8 [P*M, Kp], row_scale f32 [M], plane_offset i32 [P*M], codes u8 [N, Kp/2], header u8 [N, Kp/32],
    channel_scale f32 [N]) -> y f32 [M, N]``; the int8 weight is (code - zero) * multiplier.
    ``plane_offset`` is not needed here: it stands in the signature because other families bias these weights.
    """
    padded, count = round_up(in_features, PLANE_MULTIPLE), planes
    groups = padded // GROUP
    require_groups(in_features)
    require_indexable("the weight", out_features, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((count * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((count * rows,), "int32"),
        codes: T.Buffer((out_features, padded // 2), "uint8"),
        header: T.Buffer((out_features, groups), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for output in loop_over(out_features, work_us(rows, out_features, in_features, count)):
                weight = T.alloc_buffer((padded,), "int8")
                for group in T.serial(groups):
                    unpack_int4(weight, codes, header[output, group], output, group)
                for row in T.serial(rows):
                    sums = new_sums(count)
                    for step in T.serial(padded // LANES):
                        add_products(sums, widened(weight[lanes(step * LANES)]), planes, rows, row, step * LANES)
                    y[row, output] = joined(plane_sums(sums)) * channel_scale[output] * row_scale[row]

    return kernel


def linear_block(rows: int, out_features: int, in_features: int, bits: int) -> tirx.PrimFunc:
    """Build the linear layer on Q4_0 (4 bits) or Q8_0 (8 bits) weights, packed as `pack_block` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], codes u8 [N, Kp*bits/8], block_scale f32 [N, Kp/32])
    -> y f32 [M, N]``; the weight is (code - 8 or 128) * block_scale.
    Order: groups ascending, o = fma(256 * f32(H) + f32(L), block_scale, o) with the int32 sums H and L of the
    group; y = o * row_scale.
    """
    padded = round_up(in_features, PLANE_MULTIPLE)
    require_bits(bits)
    require_groups(in_features)
    require_indexable("the weight", out_features, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        codes: T.Buffer((out_features, padded * bits // 8), "uint8"),
        block_scale: T.Buffer((out_features, padded // GROUP), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for output in loop_over(out_features, work_us(rows, out_features, in_features, MOST_PLANES)):
                total = T.alloc_buffer((1,), "float32")
                for row in T.serial(rows):
                    total[0] = T.float32(0.0)
                    for group in T.serial(padded // GROUP):
                        sums = new_sums(MOST_PLANES)
                        _add_block(sums, codes, bits, planes, rows, row, output, group)
                        total[0] = fma(joined(plane_sums(sums)), block_scale[output, group], total[0])
                    y[row, output] = total[0] * row_scale[row]

    return kernel


def embed_int8(tokens: int, vocabulary: int, columns: int) -> tirx.PrimFunc:
    """Build ``(token_ids i64 [T], weight u8 [V, Dp], channel_scale f32 [V]) -> x f32 [T, D]``, packed by `pack_int8`.

    x[t, d] = (weight[id, d] - 128) * channel_scale[id]. Ids must be in 0..V-1: the runtime checks them.
    """
    padded = round_up(columns, PLANE_MULTIPLE)
    require_indexable("the embedding", vocabulary, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        token_ids: T.Buffer((tokens,), "int64"),
        weight: T.Buffer((vocabulary, padded), "uint8"),
        channel_scale: T.Buffer((vocabulary,), "float32"),
        x: T.Buffer((tokens, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * columns / _EMBEDDED_PER_US):
                row: T.let = T.cast(token_ids[token], "int32")
                for d in T.serial(columns):
                    value: T.let = T.cast(weight[row, d], "int32") - INT8_BIAS
                    x[token, d] = T.cast(value, "float32") * channel_scale[row]

    return kernel
