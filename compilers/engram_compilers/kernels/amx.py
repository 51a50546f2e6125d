# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers for x86 with AMX: int8 products of whole tiles, for two rows and more.

The functions, arguments, packed weights and results are those of `avx512_vnni`, bit for bit; one row, block formats
and the embedding are its kernels. Tiles must be permitted to the process (`engram_runtime.cpu.request_tiles`); what is
measured of them, and what is not, stands in DESIGN.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels import avx512_vnni
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
from engram_compilers.kernels.avx512_vnni import embed_int8, linear_block, pack_block, pack_int4, pack_int8
from engram_compilers.kernels.intrinsics import TILE_ROWS, Expr, lanes, release_tiles, splat
from engram_compilers.kernels.loops import LANES, round_up
from engram_compilers.kernels.packing import require_groups
from engram_compilers.kernels.vnni_blocks import Plan, each_tile_group, load_edge
from engram_compilers.kernels.vnni_layout import VECTOR_BYTES

__all__ = ["embed_int8", "linear_block", "linear_int4", "linear_int8", "pack_block", "pack_int4", "pack_int8"]


# (first tile, tiles) -> weights of a tile group, for its first block and for the others
WeightsOf = Callable[[Expr, int], tuple[Weights, Weights]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan(Plan):
    """The sizes of a linear layer; a block is the rows of x whose planes fill the tiles of activations."""

    operands: Tiles

    @property
    def work_us(self) -> float:
        weights = self.out_features * self.in_features
        return max(weights / WEIGHTS_PER_US, self.plane_rows * weights / PRODUCTS_PER_US)

    @property
    def blocks(self) -> int:
        return round_up(self.rows, self.block_rows) // self.block_rows

    def first_rows(self, block: Expr) -> list[Expr]:
        """Return the row of the planes where each tile of activations begins."""
        if self.operands.row_tiles == 1:
            return [0]
        if self.planes == 2:
            first = self._inside(block * self.operands.rows)
            return [first, self.rows + first]
        return [self._inside((2 * block + q) * self.operands.rows) for q in range(2)]

    def runs(self, first_rows: list[Expr]) -> list[tuple[Expr, list[int]]]:
        """Return, for each run of rows in a block, its first row of x and where its planes' sums begin."""
        if self.planes == 2:
            return [(first_rows[0], [0, self.run_rows])]
        return [(first, [q * self.run_rows]) for q, first in enumerate(first_rows)]

    @property
    def run_rows(self) -> int:
        return self.block_rows if self.planes == 2 else self.operands.rows

    def _inside(self, first: Expr) -> Expr:
        """Move the last tile up to end with the last row: rows it shares with the one before come out the same."""
        return T.min(first, self.rows - self.operands.rows) if self.rows % self.operands.rows else first


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What all linear layers take and make, as buffers."""

    plan: TilePlan
    planes: Expr
    row_scale: Expr
    plane_offset: Expr
    channel_scale: Expr
    y: Expr

    def each_tile_group(self, weights_of: WeightsOf) -> None:
        """Emit the layer; ``weights_of`` makes the weights of a tile group for its first block and for the others."""

        def tile_group(first_tile: Expr, num_tiles: int) -> None:
            first_weights, weights = weights_of(first_tile, num_tiles)
            sums = self.plan.operands.new_sums()
            self.plan.operands.configure()
            self._block(0, first_tile, num_tiles, sums, first_weights)
            if self.plan.blocks > 1:
                with T.serial(1, self.plan.blocks) as block:
                    self._block(block, first_tile, num_tiles, sums, weights)
            release_tiles()

        each_tile_group(self.plan, tile_group)

    def _block(self, block: Expr, first_tile: Expr, num_tiles: int, sums: Expr, weights: Weights) -> None:
        plan = self.plan
        first_rows = plan.first_rows(block)
        plan.operands.multiply(sums, self.planes, first_rows, num_tiles, weights)
        scales = [load_edge(plan, self.channel_scale, first_tile + t)[lanes(0)] for t in range(num_tiles)]
        for first, places in plan.runs(first_rows):
            with T.serial(plan.run_rows) as r:
                row = T.Bind(first + r)
                planes = [
                    [
                        sums[t, place + r, lanes(0)] + splat(self.plane_offset[plane * plan.rows + row])
                        for t in range(num_tiles)
                    ]
                    for plane, place in enumerate(places)
                ]
                store_row(plan, self.y, row, first_tile, planes, scales, self.row_scale[row])


def linear_int8(rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build `tiled.linear_int8` on tiles: the same arguments, the same bits."""
    if rows == 1:
        return avx512_vnni.linear_int8(rows, out_features, in_features, planes)
    plan = _plan(rows, out_features, in_features, planes)

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


def _int8_body(
    plan: TilePlan, planes: Expr, row_scale: Expr, plane_offset: Expr, weight: Expr, channel_scale: Expr, y: Expr
) -> None:
    layer = Layer(
        plan=plan, planes=planes, row_scale=row_scale, plane_offset=plane_offset, channel_scale=channel_scale, y=y
    )

    def weights_of(first_tile: Expr, num_tiles: int) -> tuple[Weights, Weights]:
        fetched = fetched_weights(weight, first_tile, num_tiles, first_tile + plan.group_tiles)
        return fetched, stored_weights(weight, first_tile, num_tiles)

    layer.each_tile_group(weights_of)


def linear_int4(rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build `tiled.linear_int4` on tiles: the same arguments, the same bits. Every weight is unpacked once."""
    require_groups(in_features)
    if rows == 1:
        return avx512_vnni.linear_int4(rows, out_features, in_features, planes)
    plan = _plan(rows, out_features, in_features, planes)

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
            _int4_body(plan, planes, row_scale, plane_offset, codes, header, channel_scale, y)

    return kernel


def _int4_body(
    plan: TilePlan,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    channel_scale: Expr,
    y: Expr,
) -> None:
    layer = Layer(
        plan=plan, planes=planes, row_scale=row_scale, plane_offset=plane_offset, channel_scale=channel_scale, y=y
    )

    def weights_of(first_tile: Expr, num_tiles: int) -> tuple[Weights, Weights]:
        scratch = new_scratch(num_tiles, plan.steps, read_again=plan.blocks > 1)
        next_tile = first_tile + plan.group_tiles
        unpacked = unpacked_weights(scratch, codes, header, first_tile, num_tiles, next_tile)
        return unpacked, stored_weights(scratch, 0, num_tiles)

    layer.each_tile_group(weights_of)


def _plan(rows: int, out_features: int, in_features: int, planes: int) -> TilePlan:
    row_tiles = 1 if planes * rows <= TILE_ROWS else 2
    blocks = -(-planes * rows // (row_tiles * TILE_ROWS))
    tile_rows = -(-planes * rows // (row_tiles * blocks))
    operands = Tiles(row_tiles, tile_rows)
    return TilePlan(
        isa=avx512_vnni.ISA,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        block_rows=row_tiles * tile_rows // planes,
        group_tiles=operands.weight_tiles,
        planes=planes,
        operands=operands,
    )
