# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers of routed experts of the tiled families: the steps of `tiled` on the experts' own tiles.

A tile group goes over the segments of `experts.Segments` one after the other, and a row block takes some pairs of
one segment. While a block runs, the tiles that are needed next are prefetched: the same ones of the next expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.experts import Routing, Segments
from engram_compilers.kernels.intrinsics import Expr, lanes, splat
from engram_compilers.kernels.isa import Isa
from engram_compilers.kernels.loops import LANES
from engram_compilers.kernels.packing import Arrays, Bytes, pad, require_groups
from engram_compilers.kernels.quantise import MOST_PLANES, joined
from engram_compilers.kernels.tiled import INT4_TILES
from engram_compilers.kernels.tiled_packing import pack_int4, pack_int8
from engram_compilers.kernels.vnni_blocks import (
    PRODUCTS_PER_US,
    WEIGHTS_PER_US,
    Block,
    Plan,
    Sums,
    add_int8_products,
    each_tile_group,
    prefetch_steps,
    start_sums,
    store_edge,
)
from engram_compilers.kernels.vnni_layout import DOTS, VECTOR_BYTES, Layout, code_vectors, each_int4_part

_MOST_EXACT = 3  # pairs left over that get a block of their own size; of more, half a block goes first


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlan(Plan):
    """The sizes of one layer of all experts; a row of x serves one pair or all pairs of a token."""

    routing: Routing

    @property
    def per_row(self) -> int:
        """Pairs that read the same row of x."""
        return self.routing.pairs // self.rows

    @property
    def weight_tiles(self) -> int:
        return self.routing.experts * self.tiles

    @property
    def work_us(self) -> float:
        weights = self.out_features * self.in_features
        return max(self.routing.segments * weights / WEIGHTS_PER_US, self.routing.pairs * weights / PRODUCTS_PER_US)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBlock(Block):
    """Some pairs of one segment times some tiles of their expert."""

    plan: ExpertPlan
    pairs: tuple[Expr, ...]
    weight_tile: Expr  # the first one, among the tiles of all experts
    next_weight_tile: Expr  # the first one the tile group needs after these

    def row(self, r: int) -> Expr:
        """See `Block.row`."""
        return self.pairs[r] // self.plan.per_row


def pack_expert_int8(weight: Bytes, scale: NDArray[np.float32], layout: Layout = DOTS) -> Arrays:
    """Pack one expert's weight stored as value + 128, ``[N, K]``, and ``scale [N]``; experts follow one another.

    Returns:
        weight: ``[Np/16, Kp/4, 64]``, as `pack_int8` lays it out.
        scale: ``[Np/16, 16]``.
    """
    return {**pack_int8(weight, layout), "scale": _tiled_scale(scale)}


def pack_expert_int4(
    codes: Bytes, multiplier: Bytes, zero: Bytes, scale: NDArray[np.float32], layout: Layout = DOTS
) -> Arrays:
    """Pack one expert's weight as `pack_int4` does, and ``scale [N]``; experts follow one another.

    Returns:
        codes: ``[Np/16, Kp/8, 64]``.
        header: ``[Np/16, Kp/32, 16]``.
        scale: ``[Np/16, 16]``.
    """
    return {**pack_int4(codes, multiplier, zero, layout), "scale": _tiled_scale(scale)}


def _tiled_scale(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return pad(scale[None], 1, LANES).reshape(-1, LANES)


def expert_linear_int8(isa: Isa, routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build the linear layer of the chosen experts on int8 weights, packed by `pack_expert_int8`.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], order, expert, start, count,
    weight u8 [E * Np/16, Kp/4, 64], scale f32 [E * Np/16, 16]) -> y f32 [P, N]``: row p of y is what `linear_int8`
    makes of row p / (P / M) of x and the weight of p's expert; M is T or P. order .. count: `experts.Segments`.
    """
    plan = _plan(isa, routing, rows, out_features, in_features, isa.sums // MOST_PLANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((plan.weight_tiles, plan.steps, VECTOR_BYTES), "uint8"),
        scale: T.Buffer((plan.weight_tiles, LANES), "float32"),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _int8_body(plan, Segments(order, expert, start, count), planes, row_scale, plane_offset, weight, scale, y)

    return kernel


def _int8_body(
    plan: ExpertPlan,
    segments: Segments,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    weight: Expr,
    scale: Expr,
    y: Expr,
) -> None:
    def run(block: ExpertBlock) -> None:
        sums = start_sums(block, plane_offset)
        add_int8_products(block, sums, planes, weight, block.weight_tile, block.next_weight_tile)
        _store(block, y, sums, scale, row_scale)

    _each_block(plan, segments, run)


def expert_linear_int4(isa: Isa, routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build `expert_linear_int8` for two-level int4 weights, packed by `pack_expert_int4`.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], order, expert, start, count,
    codes u8 [E * Np/16, Kp/8, 64], header u8 [E * Np/16, Kp/32, 16], scale f32 [E * Np/16, 16]) -> y f32 [P, N]``
    """
    require_groups(in_features)
    plan = _plan(isa, routing, rows, out_features, in_features, INT4_TILES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        codes: T.Buffer((plan.weight_tiles, plan.steps // 2, VECTOR_BYTES), "uint8"),
        header: T.Buffer((plan.weight_tiles, plan.groups, LANES), "uint8"),
        scale: T.Buffer((plan.weight_tiles, LANES), "float32"),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _int4_body(
                plan, Segments(order, expert, start, count), planes, row_scale, plane_offset, codes, header, scale, y
            )

    return kernel


def _int4_body(
    plan: ExpertPlan,
    segments: Segments,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    scale: Expr,
    y: Expr,
) -> None:
    each_part = partial(each_int4_part, layout=plan.isa.layout, bias=plan.isa.weight_bias)

    def run(block: ExpertBlock) -> None:
        sums = start_sums(block, plane_offset)
        with T.serial(plan.groups) as group:
            for t in range(block.num_tiles):
                add = partial(block.add_products, sums, t, planes)
                each_part(codes, header, block.weight_tile + t, group, add)
            prefetch_steps(codes, block.next_weight_tile, block.num_tiles, code_vectors(group, 4))
        _store(block, y, sums, scale, row_scale)

    _each_block(plan, segments, run)


def _plan(isa: Isa, routing: Routing, rows: int, out_features: int, in_features: int, tiles_at_once: int) -> ExpertPlan:
    """Choose blocks of pairs; ``tiles_at_once`` is for one pair, more of them take one tile."""
    tiles = -(-out_features // LANES)
    block_pairs = min(routing.tokens, isa.sums // MOST_PLANES)
    return ExpertPlan(
        isa=isa,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        planes=MOST_PLANES,
        block_rows=block_pairs,
        # A divisor, so that no code is needed for a shorter last group.
        group_tiles=gcd(tiles, tiles_at_once) if block_pairs == 1 else 1,
        routing=routing,
    )


def _each_block(plan: ExpertPlan, segments: Segments, run: Callable[[ExpertBlock], None]) -> None:
    """Emit run(block) for all tile groups and segments, in blocks of as many pairs as fit."""

    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        segments.each(lambda segment, first, size: _segment(plan, segments, first_tile, segment, first, size, run))

    each_tile_group(plan, tile_group)


def _segment(
    plan: ExpertPlan,
    segments: Segments,
    first_tile: Expr,
    segment: Expr,
    first: Expr,
    size: Expr,
    run: Callable[[ExpertBlock], None],
) -> None:
    is_last = segment + 1 == segments.count[0]
    following = T.min(first_tile + plan.group_tiles, plan.tiles - plan.group_tiles)
    next_tile = T.Select(is_last, following, first_tile)
    weight_tile = T.Bind(segments.weight_row(segment, plan.tiles) + first_tile)
    next_weight_tile = T.Bind(segments.weight_row(segment + 1, plan.tiles) + next_tile)

    def block(place: Expr, num_pairs: int) -> None:
        pairs = tuple(T.Bind(segments.order[place + r]) for r in range(num_pairs))
        run(
            ExpertBlock(
                plan=plan,
                first_row=place,
                num_rows=num_pairs,
                first_tile=first_tile,
                num_tiles=plan.group_tiles,
                pairs=pairs,
                weight_tile=weight_tile,
                next_weight_tile=next_weight_tile,
            )
        )

    with T.serial(size // plan.block_rows) as index:
        block(first + index * plan.block_rows, plan.block_rows)
    _each_rest(first + size, size % plan.block_rows, plan.block_rows - 1, block)


def _each_rest(end: Expr, size: Expr, most: int, block: Callable[[Expr, int], None]) -> None:
    """Emit block(place, pairs) for the last ``size`` pairs before ``end``, at most ``most``."""
    if most > _MOST_EXACT:
        half = (most + 1) // 2
        with T.If(size >= half), T.Then():
            block(end - size, half)
        size, most = T.Bind(T.Select(size >= half, size - half, size)), max(half - 1, most - half)
    for rest in range(1, most + 1):
        with T.If(size == rest), T.Then():
            block(end - rest, rest)


def _store(block: ExpertBlock, y: Expr, sums: Sums, scale: Expr, row_scale: Expr) -> None:
    """y = ((256 * f32(H) + f32(L)) * scale) * row_scale, to the rows of the pairs."""
    for t in range(block.num_tiles):
        channel_scale = T.Bind(scale[block.weight_tile + t, lanes(0)])
        for r, pair in enumerate(block.pairs):
            value = joined(block.plane_sums(sums, r, t)) * channel_scale * splat(row_scale[block.row(r)])
            store_edge(block.plan, y, pair, block.first_tile + t, value)
