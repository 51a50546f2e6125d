# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers of the tiled families on GGUF's block formats, whose scale is a float per group."""

from functools import partial
from itertools import product

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, fma, lane_sum, lanes, new_lanes, splat
from engram_compilers.kernels.isa import Isa
from engram_compilers.kernels.loops import LANES
from engram_compilers.kernels.packing import BLOCK_BIAS, GROUP, require_bits, require_groups
from engram_compilers.kernels.quantise import MOST_PLANES, joined
from engram_compilers.kernels.vnni_blocks import (
    Block,
    Plan,
    each_row_block,
    each_tile_group,
    new_sums,
    prefetch_steps,
    store_edge,
)
from engram_compilers.kernels.vnni_layout import (
    VECTOR_BYTES,
    code_vectors,
    each_byte_part,
    each_nibble_part,
    rebiased,
)

_Totals = dict[tuple[int, int], Expr]  # (row of the block, tile of the block) -> float32 [16]


def linear_block(isa: Isa, rows: int, out_features: int, in_features: int, bits: int) -> tirx.PrimFunc:
    """Build the linear layer on Q4_0 (4 bits) or Q8_0 (8 bits) weights, packed as `pack_block` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], codes u8 [Np/16, Kp*bits/32, 64],
    block_scale f32 [Np/16, Kp/32, 16]) -> y f32 [M, N]``; the weight is (code - 8 or 128) * block_scale.
    Order: groups ascending, o = fma(256 * f32(H) + f32(L), block_scale, o) with the int32 sums H and L of the
    group; y = o * row_scale.
    """
    require_bits(bits)
    require_groups(in_features)
    # A row's total and the two sums of a group it is made from are in registers together.
    block_rows = min(rows, isa.sums // 3)
    plan = Plan(
        isa=isa,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        planes=MOST_PLANES,
        block_rows=block_rows,
        group_tiles=max(1, isa.sums // 4) if rows == 1 else 1,
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
    offsets = group_offsets(plan, planes, _bias(plan.isa, bits))

    def row_block(block: Block) -> None:
        totals = {(r, t): new_lanes("float32") for r, t in product(range(block.num_rows), range(block.num_tiles))}
        for total in totals.values():
            T.buffer_store(total, splat(0.0), [lanes(0)])
        with T.serial(plan.groups) as group:
            for t in range(block.num_tiles):
                _add_group(block, totals, t, planes, offsets, codes, block_scale, group, bits)
            if block.is_first:
                next_tile = block.first_tile + block.num_tiles
                prefetch_steps(codes, next_tile, block.num_tiles, code_vectors(group, bits))
        for (r, t), total in totals.items():
            row = block.first_row + r
            store_edge(plan, y, row, block.first_tile + t, total[lanes(0)] * splat(row_scale[row]))

    each_tile_group(plan, lambda first_tile, num_tiles: each_row_block(plan, first_tile, num_tiles, row_block))


def _bias(isa: Isa, bits: int) -> int:
    """Return what a code is above its value when it is multiplied."""
    return BLOCK_BIAS[4] if bits == 4 else isa.weight_bias


def group_offsets(plan: Plan, planes: Expr, bias: int) -> Expr:
    """Return int32 [2M, K/32], -bias * sum of a group's activations: with it biased codes act as signed ones."""
    offsets = T.alloc_buffer((plan.plane_rows, plan.groups), "int32")
    with T.grid(plan.plane_rows, plan.groups) as (row, group):
        halves = (T.cast(planes[row, lanes(group * GROUP + i)], "int32x16") for i in (0, LANES))
        T.buffer_store(offsets, lane_sum(sum(halves, splat(0))) * -bias, [row, group])
    return offsets


def _add_group(
    block: Block,
    totals: _Totals,
    t: int,
    planes: Expr,
    offsets: Expr,
    codes: Expr,
    block_scale: Expr,
    group: Expr,
    bits: int,
) -> None:
    """Add a group's scaled sums to totals[:, t]."""
    sums = new_sums(block, lambda plane, r: offsets[block.plane_row(plane, r), group], num_tiles=1)
    add = partial(block.add_products, sums, 0, planes)
    if bits == 4:
        each_nibble_part(codes, block.first_tile + t, group, add)
    else:

        def add_rebiased(octet: Expr, part: int, weights: Expr) -> None:
            add(octet, part, rebiased(weights, block.plan.isa.weight_bias))

        each_byte_part(codes, block.first_tile + t, group, add_rebiased)
    scale = T.Bind(block_scale[block.first_tile + t, group, lanes(0)])
    for r in range(block.num_rows):
        total = totals[r, t]
        T.buffer_store(total, fma(joined(block.plane_sums(sums, r, 0)), scale, total[lanes(0)]), [lanes(0)])
