# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers for x86 with AVX512-VNNI: 16 outputs to a vector, four products to a lane.

Sums of products are integers, exact in any order, and the few float operations after them come in a stated order:
the bits depend neither on blocking, rows or threads nor on the family (see `portable`). The layout of weights is
described in `vnni_layout`, the blocking in `vnni_blocks`; block sizes were measured on Zen 4.
"""

from functools import partial
from itertools import product

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
from engram_compilers.kernels.quantise import PLANE_MULTIPLE
from engram_compilers.kernels.vnni_blocks import (
    Block,
    Plan,
    add_int8_products,
    each_row_block,
    each_tile_group,
    joined,
    prefetch_steps,
    start_sums,
    store_edge,
    store_sums,
)
from engram_compilers.kernels.vnni_layout import (
    STEP,
    VECTOR_BYTES,
    code_vectors,
    each_byte_step,
    each_int4_step,
    each_nibble_step,
    tile_bytes,
    tile_groups,
    tile_nibbles,
)
from engram_runtime.errors import CompileError

_BLOCK_ROWS = 4  # 8 plane rows share a load of a weight vector
_MOST_DIRECT_ROWS = 8  # that use an int4 weight as it is unpacked
_COMPUTE_BOUND_ROWS = 16  # from here on memory does not set the time
_EMBEDDED_PER_US = 1000.0


def pack_int8(weight: Bytes) -> Arrays:
    """Pack weights stored as value + 128, ``[N, K]``, for `linear_int8` and `embed_int8`.

    Returns:
        weight: ``[Np/16, Kp/4, 64]``, N and K rounded up to 16 and 64; byte 4i + b of vector (t, s) is
            output 16t + i, input 4s + b.
    """
    return {"weight": tile_bytes(pad(weight, LANES, PLANE_MULTIPLE, INT8_BIAS))}


def pack_int4(codes: Bytes, multiplier: Bytes, zero: Bytes) -> Arrays:
    """Pack ``codes [N, K]`` 0..15 with ``multiplier`` 1..16 and ``zero`` 0..15 ``[N, K/32]`` for `linear_int4`.

    Returns:
        codes: ``[Np/16, Kp/8, 64]``; byte 4i + b of vector (t, s) is output 16t + i, inputs 8s + b (low nibble)
            and 8s + 4 + b (high nibble).
        header: ``[Np/16, Kp/32, 16]``, (multiplier - 1) | zero << 4.

    Raises:
        CompileError: K is not a multiple of 32, or a group's weights do not fit int8.
    """
    require_groups(codes.shape[1])
    header = pad(int4_header(multiplier, zero), LANES, PLANE_MULTIPLE // GROUP)
    return {"codes": tile_nibbles(pad(codes, LANES, PLANE_MULTIPLE)), "header": tile_groups(header)}


def pack_block(codes: Bytes, block_scale: NDArray[np.float32], bits: int) -> Arrays:
    """Pack Q4_0 or Q8_0 ``codes [N, K]`` (value + 8 or 128) with ``block_scale [N, K/32]`` for `linear_block`.

    Returns:
        codes: as `pack_int4` (4 bits) or `pack_int8` (8 bits) lay them out.
        block_scale: float32 ``[Np/16, Kp/32, 16]``.

    Raises:
        CompileError: K is not a multiple of 32, or ``bits`` is neither 4 nor 8.
    """
    require_bits(bits)
    require_groups(codes.shape[1])
    padded = pad(codes, LANES, PLANE_MULTIPLE, BLOCK_BIAS[bits])
    scale = pad(block_scale, LANES, PLANE_MULTIPLE // GROUP)
    return {"codes": tile_nibbles(padded) if bits == 4 else tile_bytes(padded), "block_scale": tile_groups(scale)}


def _require_two_planes(planes: int) -> None:
    if planes != 2:
        raise CompileError(f"avx512_vnni kernels take 2 planes of activations, not {planes}")


def linear_int8(rows: int, out_features: int, in_features: int, planes: int = 2) -> tirx.PrimFunc:
    """Build the linear layer on int8 weights, packed as `pack_int8` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], weight u8 [Np/16, Kp/4, 64],
    channel_scale f32 [N]) -> y f32 [M, N]``:
    y[m, n] = ((256 * f32(H) + f32(L)) * channel_scale[n]) * row_scale[m], where H and L are the int32 sums of the
    high and the low plane, plane_offset[p] + sum_k planes[p, k] * weight[n, k].
    """
    _require_two_planes(planes)
    plan = Plan(
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        block_rows=min(rows, _BLOCK_ROWS),
        # One row needs many sums to hide latency; a few rows read memory fastest as one stream.
        group_tiles=8 if rows == 1 else 2 if rows == 2 or rows >= _COMPUTE_BOUND_ROWS else 1,
    )

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        weight: T.Buffer((plan.tiles, plan.steps, VECTOR_BYTES), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _int8_body(plan, planes, row_scale, plane_offset, weight, channel_scale, y)

    return kernel


def _int8_body(
    plan: Plan, planes: Expr, row_scale: Expr, plane_offset: Expr, weight: Expr, channel_scale: Expr, y: Expr
) -> None:
    def row_block(block: Block) -> None:
        sums = start_sums(block, plane_offset)
        add_int8_products(block, sums, planes, weight, block.first_tile, block.first_tile + block.num_tiles)
        store_sums(block, y, sums, channel_scale, row_scale)

    each_tile_group(plan, lambda first_tile, num_tiles: each_row_block(plan, first_tile, num_tiles, row_block))


def linear_int4(rows: int, out_features: int, in_features: int, planes: int = 2) -> tirx.PrimFunc:
    """Build the linear layer on two-level int4 weights, packed as `pack_int4` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], codes u8 [Np/16, Kp/8, 64],
    header u8 [Np/16, Kp/32, 16], channel_scale f32 [N]) -> y f32 [M, N]``: as `linear_int8` with the int8 weight
    (code - zero) * multiplier. Up to 8 rows use each weight as it is unpacked; more rows unpack a tile group once.
    """
    _require_two_planes(planes)
    require_groups(in_features)
    direct = rows <= _MOST_DIRECT_ROWS
    plan = Plan(
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        block_rows=rows if direct else _BLOCK_ROWS,
        group_tiles=4 if rows == 1 else 1 if direct else 2,
    )
    body = _int4_direct_body if direct else _int4_unpacking_body

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        codes: T.Buffer((plan.tiles, plan.steps // 2, VECTOR_BYTES), "uint8"),
        header: T.Buffer((plan.tiles, plan.groups, LANES), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            body(plan, planes, row_scale, plane_offset, codes, header, channel_scale, y)

    return kernel


def _int4_direct_body(
    plan: Plan,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    channel_scale: Expr,
    y: Expr,
) -> None:
    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        block = Block(plan, 0, plan.rows, first_tile, num_tiles)
        sums = start_sums(block, plane_offset)
        with T.serial(plan.groups) as group:
            for t in range(num_tiles):
                each_int4_step(codes, header, first_tile + t, group, partial(block.add_products, sums, t, planes))
            prefetch_steps(codes, first_tile + num_tiles, num_tiles, code_vectors(group, 4))
        store_sums(block, y, sums, channel_scale, row_scale)

    each_tile_group(plan, tile_group)


def _int4_unpacking_body(
    plan: Plan,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    channel_scale: Expr,
    y: Expr,
) -> None:
    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        weight = T.alloc_buffer((num_tiles, plan.steps, VECTOR_BYTES), "uint8")  # too large for a stack
        with T.grid(num_tiles, plan.groups) as (t, group):

            def keep(step: Expr, weights: Expr) -> None:
                T.buffer_store(weight, weights, [t, step, lanes(0, VECTOR_BYTES)])

            each_int4_step(codes, header, first_tile + t, group, keep)
            prefetch_steps(codes, first_tile + num_tiles + t, 1, code_vectors(group, 4))

        def row_block(block: Block) -> None:
            sums = start_sums(block, plane_offset)
            add_int8_products(block, sums, planes, weight, 0, num_tiles)
            store_sums(block, y, sums, channel_scale, row_scale)

        each_row_block(plan, first_tile, num_tiles, row_block)

    each_tile_group(plan, tile_group)


def linear_block(rows: int, out_features: int, in_features: int, bits: int) -> tirx.PrimFunc:
    """Build the linear layer on Q4_0 (4 bits) or Q8_0 (8 bits) weights, packed as `pack_block` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], codes u8 [Np/16, Kp*bits/32, 64],
    block_scale f32 [Np/16, Kp/32, 16]) -> y f32 [M, N]``; the weight is (code - 8 or 128) * block_scale.
    Order: groups ascending, o = fma(256 * f32(H) + f32(L), block_scale, o) with the int32 sums H and L of the
    group; y = o * row_scale.
    """
    require_bits(bits)
    require_groups(in_features)
    plan = Plan(
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        block_rows=min(rows, _BLOCK_ROWS),
        group_tiles=4 if rows == 1 else 1,
    )

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        codes: T.Buffer((plan.tiles, plan.steps * bits // 8, VECTOR_BYTES), "uint8"),
        block_scale: T.Buffer((plan.tiles, plan.groups, LANES), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _block_body(plan, bits, planes, row_scale, codes, block_scale, y)

    return kernel


def _block_body(plan: Plan, bits: int, planes: Expr, row_scale: Expr, codes: Expr, block_scale: Expr, y: Expr) -> None:
    offsets = _group_offsets(plan, planes, BLOCK_BIAS[bits])

    def row_block(block: Block) -> None:
        every = list(product(range(block.num_rows), range(block.num_tiles)))
        totals = T.alloc_local((block.num_rows, block.num_tiles, LANES), "float32")
        for r, t in every:
            T.buffer_store(totals, splat(0.0), [r, t, lanes(0)])
        with T.serial(plan.groups) as group:
            for t in range(block.num_tiles):
                _add_group(block, totals, t, planes, offsets, codes, block_scale, group, bits)
            if block.is_first:
                next_tile = block.first_tile + block.num_tiles
                prefetch_steps(codes, next_tile, block.num_tiles, code_vectors(group, bits))
        for r, t in every:
            row = block.first_row + r
            store_edge(plan, y, row, block.first_tile + t, totals[r, t, lanes(0)] * splat(row_scale[row]))

    each_tile_group(plan, lambda first_tile, num_tiles: each_row_block(plan, first_tile, num_tiles, row_block))


def _group_offsets(plan: Plan, planes: Expr, bias: int) -> Expr:
    """Return int32 [2M, K/32], -bias * sum of a group's activations: with it biased codes act as signed ones."""
    offsets = T.alloc_buffer((2 * plan.rows, plan.groups), "int32")
    with T.grid(2 * plan.rows, plan.groups) as (row, group):
        halves = (T.cast(planes[row, lanes(group * GROUP + i)], "int32x16") for i in (0, LANES))
        T.buffer_store(offsets, lane_sum(sum(halves, splat(0))) * -bias, [row, group])
    return offsets


def _add_group(
    block: Block,
    totals: Expr,
    t: int,
    planes: Expr,
    offsets: Expr,
    codes: Expr,
    block_scale: Expr,
    group: Expr,
    bits: int,
) -> None:
    """Add a group's scaled sums to totals[:, t]."""
    sums = T.alloc_local((2, block.num_rows, 1, LANES), "int32")
    for plane, r in product(range(2), range(block.num_rows)):
        T.buffer_store(sums, splat(offsets[block.plane_row(plane, r), group]), [plane, r, 0, lanes(0)])
    each_step = each_nibble_step if bits == 4 else each_byte_step
    each_step(codes, block.first_tile + t, group, partial(block.add_products, sums, 0, planes))
    scale = T.Bind(block_scale[block.first_tile + t, group, lanes(0)])
    for r in range(block.num_rows):
        index = [r, t, lanes(0)]
        T.buffer_store(totals, fma(joined(sums, r, 0), scale, totals[index]), index)


def embed_int8(tokens: int, vocabulary: int, columns: int) -> tirx.PrimFunc:
    """Build the embedding lookup in a weight packed by `pack_int8`, which an output layer may share.

    ``(token_ids i64 [T], weight u8 [Vp/16, Dp/4, 64], channel_scale f32 [V]) -> x f32 [T, D]``:
    x[t, d] = (weight[id, d] - 128) * channel_scale[id]. Ids must be in 0..V-1: the runtime checks them.
    """
    tiles, steps = round_up(vocabulary, LANES) // LANES, round_up(columns, PLANE_MULTIPLE) // STEP
    require_indexable("the embedding", tiles, steps, VECTOR_BYTES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        token_ids: T.Buffer((tokens,), "int64"),
        weight: T.Buffer((tiles, steps, VECTOR_BYTES), "uint8"),
        channel_scale: T.Buffer((vocabulary,), "float32"),
        x: T.Buffer((tokens, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * columns / _EMBEDDED_PER_US):
                row: T.let = T.cast(token_ids[token], "int32")
                for d in T.serial(columns):
                    value: T.let = T.cast(weight[row // LANES, d // STEP, row % LANES * STEP + d % STEP], "int32")
                    x[token, d] = T.cast(value - INT8_BIAS, "float32") * channel_scale[row]

    return kernel
