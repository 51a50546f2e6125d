# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers of routed experts for x86 with AMX: the tiles of `amx` on the experts' own weights.

The planes are first gathered in the order of the pairs, high and low row of a pair side by side: the pairs of a segment
are then rows at one distance, as tiles want them. A tile that holds more rows than its segment sums the next one's too,
and drops them; one of a single pair gains little by VNNI (DESIGN.md). Calls of one token are the kernels of
`avx512_vnni_experts`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels import avx512_vnni_experts
from engram_compilers.kernels.amx_blocks import (
    PRODUCTS_PER_US,
    WEIGHTS_PER_US,
    Tiles,
    Weights,
    fetched_weights,
    new_scratch,
    store_row,
    stored_weights,
    unpacked_weights,
)
from engram_compilers.kernels.avx512_vnni import ISA
from engram_compilers.kernels.avx512_vnni_experts import pack_expert_int4, pack_expert_int8
from engram_compilers.kernels.experts import Routing, Segments
from engram_compilers.kernels.intrinsics import TILE_ROWS, Expr, lanes, release_tiles, splat
from engram_compilers.kernels.loops import LANES, loop_over
from engram_compilers.kernels.packing import require_groups
from engram_compilers.kernels.quantise import MOST_PLANES
from engram_compilers.kernels.vnni_blocks import Plan, each_tile_group
from engram_compilers.kernels.vnni_layout import VECTOR_BYTES

__all__ = ["expert_linear_int4", "expert_linear_int8", "pack_expert_int4", "pack_expert_int8"]

_GATHERED_PER_US = 10_000.0  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTilePlan(Plan):
    """The sizes of one layer of all experts; a block is the pairs whose planes fill the tiles of activations."""

    routing: Routing
    operands: Tiles

    @property
    def per_row(self) -> int:
        """Pairs that read the same row of x."""
        return self.routing.pairs // self.rows

    @property
    def weight_tiles(self) -> int:
        return self.routing.experts * self.tiles

    @property
    def gathered_rows(self) -> int:
        """Rows of planes, and those that tiles read past the last one."""
        return MOST_PLANES * (self.routing.pairs + self.block_rows)

    @property
    def work_us(self) -> float:
        weights = self.out_features * self.in_features
        products = MOST_PLANES * self.routing.pairs * weights
        return max(self.routing.segments * weights / WEIGHTS_PER_US, products / PRODUCTS_PER_US)


# (first tile of the weights, first one needed next) -> weights of a segment, for its first block and for the others
WeightsOf = Callable[[Expr, Expr], tuple[Weights, Weights]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """What all layers of experts take and make, as buffers; ``gathered`` are the planes in the order of the pairs."""

    plan: ExpertTilePlan
    segments: Segments
    gathered: Expr
    row_scale: Expr
    plane_offset: Expr
    scale: Expr
    y: Expr

    def each_segment(self, first_tile: Expr, weights_of: WeightsOf) -> None:
        """Emit a tile group."""
        sums = self.plan.operands.new_sums()
        self.plan.operands.configure()
        self.segments.each(lambda *segment: self._segment(first_tile, segment, sums, weights_of))
        release_tiles()

    def _segment(self, first_tile: Expr, place: tuple[Expr, Expr, Expr], sums: Expr, weights_of: WeightsOf) -> None:
        plan, segments = self.plan, self.segments
        segment, first, size = place
        following = T.min(first_tile + plan.group_tiles, plan.tiles - plan.group_tiles)
        next_tile = T.Select(segment + 1 == segments.count[0], following, first_tile)
        weight_tile = T.Bind(segments.weight_row(segment, plan.tiles) + first_tile)
        next_weight_tile = T.Bind(segments.weight_row(segment + 1, plan.tiles) + next_tile)
        first_weights, weights = weights_of(weight_tile, next_weight_tile)

        self._block(first_tile, weight_tile, first, size, sums, first_weights)
        if plan.routing.tokens > plan.block_rows:
            with T.serial(1, (size + plan.block_rows - 1) // plan.block_rows) as block:
                done = T.Bind(block * plan.block_rows)
                self._block(first_tile, weight_tile, first + done, size - done, sums, weights)

    def _block(
        self, first_tile: Expr, weight_tile: Expr, first: Expr, num_pairs: Expr, sums: Expr, weights: Weights
    ) -> None:
        plan = self.plan
        first_rows = [MOST_PLANES * first + q * plan.operands.rows for q in range(plan.operands.row_tiles)]
        plan.operands.multiply(sums, self.gathered, first_rows, plan.group_tiles, weights)
        scales = [T.Bind(self.scale[weight_tile + t, lanes(0)]) for t in range(plan.group_tiles)]
        with T.serial(T.min(num_pairs, plan.block_rows)) as r:
            pair = T.Bind(self.segments.order[first + r])
            row = T.Bind(pair // plan.per_row)
            planes = [
                [
                    sums[t, MOST_PLANES * r + plane, lanes(0)] + splat(self.plane_offset[plane * plan.rows + row])
                    for t in range(plan.group_tiles)
                ]
                for plane in range(MOST_PLANES)
            ]
            store_row(plan, self.y, pair, first_tile, planes, scales, self.row_scale[row])


def expert_linear_int8(routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build `tiled_experts.expert_linear_int8` on tiles: the same arguments, the same bits."""
    if routing.tokens == 1:
        return avx512_vnni_experts.expert_linear_int8(routing, rows, out_features, in_features)
    plan = _plan(routing, rows, out_features, in_features)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((MOST_PLANES * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((MOST_PLANES * rows,), "int32"),
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
    plan: ExpertTilePlan,
    segments: Segments,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    weight: Expr,
    scale: Expr,
    y: Expr,
) -> None:
    layer = _layer(plan, segments, planes, row_scale, plane_offset, scale, y)

    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        def weights_of(weight_tile: Expr, next_weight_tile: Expr) -> tuple[Weights, Weights]:
            fetched = fetched_weights(weight, weight_tile, num_tiles, next_weight_tile)
            return fetched, stored_weights(weight, weight_tile, num_tiles)

        layer.each_segment(first_tile, weights_of)

    each_tile_group(plan, tile_group)


def expert_linear_int4(routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build `tiled_experts.expert_linear_int4` on tiles: the same arguments, the same bits."""
    require_groups(in_features)
    if routing.tokens == 1:
        return avx512_vnni_experts.expert_linear_int4(routing, rows, out_features, in_features)
    plan = _plan(routing, rows, out_features, in_features)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((MOST_PLANES * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((MOST_PLANES * rows,), "int32"),
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
    plan: ExpertTilePlan,
    segments: Segments,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    scale: Expr,
    y: Expr,
) -> None:
    layer = _layer(plan, segments, planes, row_scale, plane_offset, scale, y)

    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        scratch = new_scratch(num_tiles, plan.steps, read_again=plan.routing.tokens > plan.block_rows)

        def weights_of(weight_tile: Expr, next_weight_tile: Expr) -> tuple[Weights, Weights]:
            unpacked = unpacked_weights(scratch, codes, header, weight_tile, num_tiles, next_weight_tile)
            return unpacked, stored_weights(scratch, 0, num_tiles)

        layer.each_segment(first_tile, weights_of)

    each_tile_group(plan, tile_group)


def _layer(
    plan: ExpertTilePlan,
    segments: Segments,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    scale: Expr,
    y: Expr,
) -> ExpertLayer:
    """Emit the gathering of the planes and return the layer on them."""
    gathered = T.alloc_buffer((plan.gathered_rows, plan.padded_inputs), "int8")
    pairs, row_bytes = plan.routing.pairs, MOST_PLANES * plan.padded_inputs
    with loop_over(pairs, pairs * row_bytes / _GATHERED_PER_US) as place:
        row = T.Bind(segments.order[place] // plan.per_row)
        for plane in range(MOST_PLANES):
            with T.serial(plan.padded_inputs // VECTOR_BYTES) as step:
                column = lanes(step * VECTOR_BYTES, VECTOR_BYTES)
                T.buffer_store(gathered, planes[plane * plan.rows + row, column], [MOST_PLANES * place + plane, column])
    return ExpertLayer(
        plan=plan,
        segments=segments,
        gathered=gathered,
        row_scale=row_scale,
        plane_offset=plane_offset,
        scale=scale,
        y=y,
    )


def _plan(routing: Routing, rows: int, out_features: int, in_features: int) -> ExpertTilePlan:
    most_rows = MOST_PLANES * routing.tokens  # of one expert's planes
    operands = Tiles(1, most_rows) if most_rows <= TILE_ROWS else Tiles(2, TILE_ROWS)
    return ExpertTilePlan(
        isa=ISA,
        planes=MOST_PLANES,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        block_rows=operands.row_tiles * operands.rows // MOST_PLANES,
        # A divisor, so that no code is needed for a shorter last group.
        group_tiles=gcd(-(-out_features // LANES), operands.weight_tiles),
        routing=routing,
        operands=operands,
    )
