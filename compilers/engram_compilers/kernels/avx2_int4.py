"""int4 weights with AVX2: the codes of a group are multiplied as they are, the multiplier and zero come after.

Two products of a code (0..15) and an activation are at most 2 * 15 * 128, and the eight such pairs of a group's 32
inputs that a lane adds at most 30,720: exact in 16 bits, where those of whole int8 weights would saturate.
"""

from itertools import product

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, byte_pair_sums_avx2, lanes, pair_sums_avx2, splat
from engram_compilers.kernels.isa import Isa
from engram_compilers.kernels.loops import LANES
from engram_compilers.kernels.packing import GROUP
from engram_compilers.kernels.tiled import int4_kernel
from engram_compilers.kernels.tiled_block import group_offsets
from engram_compilers.kernels.vnni_blocks import (
    Block,
    Plan,
    Sums,
    each_row_block,
    each_tile_group,
    new_sums,
    prefetch_steps,
    store_sums,
)
from engram_compilers.kernels.vnni_layout import DOTS, STEP, code_vectors, multipliers, zeros

_PLANE_ROWS = 6  # that share a group's unpacked codes
_HALF = LANES // 2  # outputs of one vector of 256 bits
_HALF_BYTES = _HALF * STEP


def linear_int4(isa: Isa, rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build `tiled.linear_int4`."""
    plan = Plan(
        isa=isa,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        planes=planes,
        block_rows=min(rows, _PLANE_ROWS // planes),
        group_tiles=1,
    )
    return int4_kernel(plan, _body)


def _body(
    plan: Plan,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    channel_scale: Expr,
    y: Expr,
) -> None:
    negative_sums = group_offsets(plan, planes, 1)

    def row_block(block: Block) -> None:
        sums = new_sums(block, lambda plane, r: 0)
        with T.serial(plan.groups) as group:
            for half in range(2):
                _add_group(block, sums, planes, negative_sums, codes, header, group, half)
            if block.is_first:
                prefetch_steps(codes, block.first_tile + 1, 1, code_vectors(group, 4))
        store_sums(block, y, sums, channel_scale, row_scale)

    each_tile_group(plan, lambda first_tile, num_tiles: each_row_block(plan, first_tile, num_tiles, row_block))


def _add_group(
    block: Block, sums: Sums, planes: Expr, negative_sums: Expr, codes: Expr, header: Expr, group: Expr, half: int
) -> None:
    """Add multiplier * (codes * activations) - zero * multiplier * (sum of activations) for 8 outputs of a tile."""
    tile, index = block.first_tile, lanes(half * _HALF, _HALF)
    (both,) = DOTS.words(header[tile, group, lanes(0)])
    multiplier = T.Bind(_half_of_pairs(multipliers(both), half))
    # Next to a zero, so that a pair's sum is one product.
    zero = T.Bind(_half_of_pairs(T.bitwise_and(zeros(both), _low_words()), half))
    steps = _nibbles(codes, tile, group, half)
    for plane, r in product(range(block.plan.planes), range(block.num_rows)):
        row, total = block.plane_row(plane, r), sums[0][r * block.plan.planes + plane]
        words = _dot(steps, planes, row, group)
        negative = T.reinterpret("int16x16", splat(negative_sums[row, group], _HALF))
        value = total[index] + pair_sums_avx2(words, multiplier) + pair_sums_avx2(zero, negative)
        T.buffer_store(total, value, [index])


def _dot(steps: list[Expr], planes: Expr, row: Expr, group: Expr) -> Expr:
    """Return int16x16: two neighbouring lanes hold the parts of an output's product with a group's activations."""
    total = None
    for s, codes in enumerate(steps):
        four = T.reinterpret("int32", planes[row, lanes(group * GROUP + s * STEP, STEP)])
        part = byte_pair_sums_avx2(codes, T.reinterpret("int8x32", T.broadcast(four, _HALF)))
        total = part if total is None else total + part
    return T.Bind(total)


def _nibbles(codes: Expr, tile: Expr, group: Expr, half: int) -> list[Expr]:
    """Return the codes of 8 outputs and a group as uint8x32, one vector a step."""
    found = []
    for index in code_vectors(group, 4):
        vector = T.Bind(codes[tile, index, lanes(half * _HALF_BYTES, _HALF_BYTES)])
        found.append(T.Bind(T.bitwise_and(vector, T.broadcast(T.uint8(15), _HALF_BYTES))))
        found.append(T.Bind(T.shift_right(vector, T.broadcast(T.uint8(4), _HALF_BYTES))))
    return found


def _half_of_pairs(words: Expr, half: int) -> Expr:
    """Return the words of 8 outputs of uint16x32 as int16x16."""
    part = T.Shuffle([words], list(range(half * LANES, (half + 1) * LANES)))
    return T.reinterpret("int16x16", part)


def _low_words() -> Expr:
    return T.reinterpret("uint16x32", splat(0xFFFF))
