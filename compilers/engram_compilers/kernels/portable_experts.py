# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers of routed experts for any machine LLVM knows: those of `tiled_experts`, bit for bit."""

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels import portable
from engram_compilers.kernels.experts import Routing
from engram_compilers.kernels.intrinsics import lanes
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.packing import GROUP, Arrays, Bytes, require_groups
from engram_compilers.kernels.portable import add_products, new_sums, plane_sums, unpack_int4, widened
from engram_compilers.kernels.quantise import MOST_PLANES, PLANE_MULTIPLE, joined


def pack_expert_int8(weight: Bytes, scale: NDArray[np.float32]) -> Arrays:
    """Pack one expert's weight stored as value + 128, ``[N, K]``, and ``scale [N]``; experts follow one another.

    Returns:
        weight: ``[N, Kp]``, K rounded up to 64.
        scale: ``[N]``.
    """
    return {**portable.pack_int8(weight), "scale": scale}


def pack_expert_int4(codes: Bytes, multiplier: Bytes, zero: Bytes, scale: NDArray[np.float32]) -> Arrays:
    """Pack one expert's weight as `portable.pack_int4` does, and ``scale [N]``; experts follow one another.

    Returns:
        codes: ``[N, Kp/2]``.
        header: ``[N, Kp/32]``.
        scale: ``[N]``.
    """
    return {**portable.pack_int4(codes, multiplier, zero), "scale": scale}


def expert_linear_int8(routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build the linear layer of the chosen experts on int8 weights, packed by `pack_expert_int8`.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], order, expert, start, count,
    weight u8 [E * N, Kp], scale f32 [E * N]) -> y f32 [P, N]``: row p of y is what `linear_int8` makes of row
    p / (P / M) of x and the weight of p's expert; M is T or P. order .. count: `experts.Segments`.
    """
    padded = round_up(in_features, PLANE_MULTIPLE)
    per_row = routing.pairs // rows
    work_us = portable.work_us(routing.pairs, out_features, in_features, MOST_PLANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((routing.experts * out_features, padded), "uint8"),
        scale: T.Buffer((routing.experts * out_features,), "float32"),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tokens": routing.tokens})
        with T.sblock("root"):
            for output in loop_over(out_features, work_us):
                for segment in T.serial(count[0]):
                    weight_row: T.let = T.cast(expert[segment], "int64") * out_features + output
                    for place in T.serial(start[segment], start[segment + 1]):
                        pair: T.let = order[place]
                        row: T.let = pair // per_row
                        sums = new_sums(MOST_PLANES)
                        for step in T.serial(padded // LANES):
                            weights = widened(weight[weight_row, lanes(step * LANES)])
                            add_products(sums, weights, planes, rows, row, step * LANES)
                        portable.add_offsets(sums, plane_offset, rows, row)
                        y[pair, output] = joined(plane_sums(sums)) * scale[weight_row] * row_scale[row]

    return kernel


def expert_linear_int4(routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build `expert_linear_int8` for two-level int4 weights, packed by `pack_expert_int4`.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], order, expert, start, count,
    codes u8 [E * N, Kp/2], header u8 [E * N, Kp/32], scale f32 [E * N]) -> y f32 [P, N]``
    """
    padded = round_up(in_features, PLANE_MULTIPLE)
    groups = padded // GROUP
    require_groups(in_features)
    per_row = routing.pairs // rows
    work_us = portable.work_us(routing.pairs, out_features, in_features, MOST_PLANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        codes: T.Buffer((routing.experts * out_features, padded // 2), "uint8"),
        header: T.Buffer((routing.experts * out_features, groups), "uint8"),
        scale: T.Buffer((routing.experts * out_features,), "float32"),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tokens": routing.tokens})
        with T.sblock("root"):
            for output in loop_over(out_features, work_us):
                weight = T.alloc_buffer((padded,), "int8")
                for segment in T.serial(count[0]):
                    weight_row: T.let = T.cast(expert[segment], "int64") * out_features + output
                    for group in T.serial(groups):
                        unpack_int4(weight, codes, header[weight_row, group], weight_row, group)
                    for place in T.serial(start[segment], start[segment + 1]):
                        pair: T.let = order[place]
                        row: T.let = pair // per_row
                        sums = new_sums(MOST_PLANES)
                        for step in T.serial(padded // LANES):
                            weights = widened(weight[lanes(step * LANES)])
                            add_products(sums, weights, planes, rows, row, step * LANES)
                        total: T.let = joined(plane_sums(sums))
                        y[pair, output] = total * scale[weight_row] * row_scale[row]

    return kernel
