# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers of the tiled families: 16 outputs to a vector, four products to a lane, on any `Isa`.

Sums of products are integers, exact in any order, and the few float operations after them come in a stated order:
the bits depend neither on blocking, rows or threads nor on the family (see `portable`). The layout of weights is
described in `vnni_layout`, the blocking in `vnni_blocks`.
"""

from collections.abc import Callable
from functools import partial

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, lanes
from engram_compilers.kernels.isa import Isa
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.packing import INT8_BIAS, require_groups, require_indexable
from engram_compilers.kernels.quantise import PLANE_MULTIPLE
from engram_compilers.kernels.vnni_blocks import (
    Block,
    Plan,
    add_int8_products,
    add_unpacked_products,
    each_row_block,
    each_tile_group,
    prefetch_steps,
    start_sums,
    store_sums,
)
from engram_compilers.kernels.vnni_layout import DOTS, STEP, VECTOR_BYTES, Layout, code_vectors, each_int4_part

INT4_TILES = 2  # streams of int4 weights of one row: unpacking hides their latency
_EMBEDDED_PER_US = 1000.0
_MOST_TILES = 8  # streams of weights at once
_SUMS_WORTH_UNPACKING = 8  # with fewer, unpacking takes as long as the products, and its constants their registers


def linear_int8(isa: Isa, rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build the linear layer on int8 weights, packed as `pack_int8` returns them; ``planes`` (P) is 1 or 2.

    ``(planes i8 [P*M, Kp], row_scale f32 [M], plane_offset i32 [P*M], weight u8 [Np/16, Kp/4, 64],
    channel_scale f32 [N]) -> y f32 [M, N]``:
    y[m, n] = (f32(S) * channel_scale[n]) * row_scale[m] of one plane, ((256 * f32(H) + f32(L)) * channel_scale[n]) *
    row_scale[m] of two. S, or H of the high and L of the low plane, are the int32 sums
    plane_offset[p] + sum_k planes[p, k] * weight[n, k].
    """
    plan = int8_plan(isa, rows, out_features, in_features, planes)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((plan.plane_rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((plan.plane_rows,), "int32"),
        weight: T.Buffer((plan.tiles, plan.steps, VECTOR_BYTES), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _int8_body(plan, planes, row_scale, plane_offset, weight, channel_scale, y)

    return kernel


def int8_plan(isa: Isa, rows: int, out_features: int, in_features: int, planes: int) -> Plan:
    """Choose the blocking of `linear_int8`: a row or two need many sums to hide latency, more rows one stream."""
    block_rows = min(rows, isa.sums // planes)
    sums_of_tile = isa.sums_of(planes * block_rows)
    return Plan(
        isa=isa,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        planes=planes,
        block_rows=block_rows,
        group_tiles=min(isa.sums // sums_of_tile, _MOST_TILES) if 2 * sums_of_tile < isa.sums else 1,
    )


def _int8_body(
    plan: Plan, planes: Expr, row_scale: Expr, plane_offset: Expr, weight: Expr, channel_scale: Expr, y: Expr
) -> None:
    def row_block(block: Block) -> None:
        sums = start_sums(block, plane_offset)
        add_int8_products(block, sums, planes, weight, block.first_tile, block.first_tile + block.num_tiles)
        store_sums(block, y, sums, channel_scale, row_scale)

    each_tile_group(plan, lambda first_tile, num_tiles: each_row_block(plan, first_tile, num_tiles, row_block))


def linear_int4(isa: Isa, rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build the linear layer on two-level int4 weights, packed as `pack_int4` returns them; ``planes`` is 1 or 2.

    ``(planes i8 [P*M, Kp], row_scale f32 [M], plane_offset i32 [P*M], codes u8 [Np/16, Kp/8, 64],
    header u8 [Np/16, Kp/32, 16], channel_scale f32 [N]) -> y f32 [M, N]``: as `linear_int8` with the int8 weight
    (code - zero) * multiplier. Blocks of rows unpack for themselves, or where few sums fit a tile group once for all.
    """
    plan = int4_plan(isa, rows, out_features, in_features, planes)
    unpacks_once = rows > 1 and isa.sums < _SUMS_WORTH_UNPACKING
    return int4_kernel(plan, _int4_unpacking_body if unpacks_once else _int4_direct_body)


def int4_kernel(plan: Plan, body: Callable[..., None]) -> tirx.PrimFunc:
    """Build the kernel of `linear_int4` with the statements of ``body``."""
    rows, out_features = plan.rows, plan.out_features
    require_groups(plan.in_features)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((plan.plane_rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((plan.plane_rows,), "int32"),
        codes: T.Buffer((plan.tiles, plan.steps // 2, VECTOR_BYTES), "uint8"),
        header: T.Buffer((plan.tiles, plan.groups, LANES), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            body(plan, planes, row_scale, plane_offset, codes, header, channel_scale, y)

    return kernel


def int4_plan(isa: Isa, rows: int, out_features: int, in_features: int, planes: int) -> Plan:
    """Choose the blocking of `linear_int4`."""
    return Plan(
        isa=isa,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        planes=planes,
        block_rows=min(rows, isa.sums // planes),
        group_tiles=INT4_TILES if rows == 1 else 1,
    )


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
    each_part = partial(each_int4_part, layout=plan.isa.layout, bias=plan.isa.weight_bias)

    def row_block(block: Block) -> None:
        sums = start_sums(block, plane_offset)
        with T.serial(plan.groups) as group:
            for t in range(block.num_tiles):
                add = partial(block.add_products, sums, t, planes)
                each_part(codes, header, block.first_tile + t, group, add)
            if block.is_first:
                next_tile = block.first_tile + block.num_tiles
                prefetch_steps(codes, next_tile, block.num_tiles, code_vectors(group, 4))
        store_sums(block, y, sums, channel_scale, row_scale)

    each_tile_group(plan, lambda first_tile, num_tiles: each_row_block(plan, first_tile, num_tiles, row_block))


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
    each_part = partial(each_int4_part, layout=plan.isa.layout, bias=plan.isa.weight_bias)

    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        weight = T.alloc_buffer((num_tiles, plan.steps, VECTOR_BYTES), "uint8")  # too large for a stack
        with T.grid(num_tiles, plan.groups) as (t, group):

            def keep(octet: Expr, part: int, weights: Expr) -> None:
                T.buffer_store(weight, weights, [t, octet * 2 + part, lanes(0, VECTOR_BYTES)])

            each_part(codes, header, first_tile + t, group, keep)
            prefetch_steps(codes, first_tile + num_tiles + t, 1, code_vectors(group, 4))

        def row_block(block: Block) -> None:
            sums = start_sums(block, plane_offset)
            add_unpacked_products(block, sums, planes, weight)
            store_sums(block, y, sums, channel_scale, row_scale)

        each_row_block(plan, first_tile, num_tiles, row_block)

    each_tile_group(plan, tile_group)


def embed_int8(tokens: int, vocabulary: int, columns: int, layout: Layout = DOTS) -> tirx.PrimFunc:
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
                    value = weight_at(layout, weight, row, d)
                    x[token, d] = T.cast(value - INT8_BIAS, "float32") * channel_scale[row]

    return kernel


def weight_at(layout: Layout, weight: Expr, output: Expr, column: Expr) -> Expr:
    """Return a byte of weights packed by `pack_int8`, as int32."""
    vector, byte = layout.place(output % LANES, column)
    return T.Bind(T.cast(weight[output // LANES, vector, byte], "int32"))
