"""How the tiled families cut a linear layer into the parts they sum in registers, and the steps its layers share.

A tile group shares the activations it loads, a row block the weights. Row blocks run inside the tile group, so a
call reads its weights from memory once; while the first block runs, the weights of the next group are prefetched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, lanes, new_lanes, prefetch, splat
from engram_compilers.kernels.isa import Isa
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.packing import GROUP, require_indexable
from engram_compilers.kernels.quantise import PLANE_MULTIPLE, joined
from engram_compilers.kernels.vnni_layout import STEP, VECTOR_BYTES, rebiased

_UNROLLED = 2  # octets of a tile per turn of the int8 loop
WEIGHTS_PER_US = 25_000.0  # from memory
PRODUCTS_PER_US = 200_000.0  # of a weight and an 8-bit activation

Sums = list[list[Expr]]  # of each tile of a block those of its plane rows, int32 [16] as its `Isa` makes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of a linear layer and how many rows and tiles are summed at once."""

    isa: Isa
    rows: int
    out_features: int
    in_features: int
    planes: int
    block_rows: int
    group_tiles: int

    def __post_init__(self) -> None:
        require_indexable("the weight", self.out_features, self.padded_inputs)

    @property
    def plane_rows(self) -> int:
        return self.planes * self.rows

    @property
    def padded_inputs(self) -> int:
        return round_up(self.in_features, PLANE_MULTIPLE)

    @property
    def steps(self) -> int:
        return self.padded_inputs // STEP

    @property
    def groups(self) -> int:
        return self.padded_inputs // GROUP

    @property
    def tiles(self) -> int:
        return round_up(self.out_features, LANES) // LANES

    @property
    def edge_lanes(self) -> int:
        """Outputs in the last tile, 0 if it is full."""
        return self.out_features % LANES

    @property
    def work_us(self) -> float:
        weights = self.out_features * self.in_features
        return max(weights / WEIGHTS_PER_US, self.plane_rows * weights / PRODUCTS_PER_US)


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows times some tiles, whose sums stay in registers."""

    plan: Plan
    first_row: Expr
    num_rows: int
    first_tile: Expr
    num_tiles: int
    is_first: bool = True  # of the row blocks of its tiles: the one that waits for memory

    def row(self, r: int) -> Expr:
        """Return the row of x that is the block's row ``r``."""
        return self.first_row + r

    def plane_row(self, plane: int, r: int) -> Expr:
        """Return the row of the planes that holds a plane of the block's row ``r``."""
        return plane * self.plan.rows + self.row(r)

    @property
    def plane_rows(self) -> list[Expr]:
        """The rows of the planes that hold the block's rows, the planes of a row next to each other."""
        return [self.plane_row(plane, r) for r, plane in product(range(self.num_rows), range(self.plan.planes))]

    def plane_sums(self, sums: Sums, r: int, t: int) -> list[Expr]:
        """Return what a row and a tile have summed, int32x16 of each plane."""
        first = r * self.plan.planes
        return [self.plan.isa.plane_sum(sums[t], first + plane) for plane in range(self.plan.planes)]

    def add_products(self, sums: Sums, t: int, planes: Expr, octet: Expr, part: int, weights: Expr) -> None:
        """Add weights * activations of a part of an octet to the sums of a tile, for all planes of every row."""
        self.plan.isa.add_products(sums[t], planes, self.plane_rows, octet, part, T.Bind(weights))


def each_tile_group(plan: Plan, run: Callable[[Expr, int], None]) -> None:
    """Emit the outer loop: run(first_tile, num_tiles) for all output tiles."""
    whole, last_tiles = divmod(plan.tiles, plan.group_tiles)
    with loop_over(whole + (last_tiles > 0), plan.work_us) as group:
        if last_tiles == 0:
            run(group * plan.group_tiles, plan.group_tiles)
            return
        with T.If(group < whole):
            with T.Then():
                run(group * plan.group_tiles, plan.group_tiles)
            with T.Else():
                run(group * plan.group_tiles, last_tiles)


def each_row_block(plan: Plan, first_tile: Expr, num_tiles: int, run: Callable[[Block], None]) -> None:
    """Emit the loop over the rows inside a tile group: run(block) for all row blocks."""
    whole, last_rows = divmod(plan.rows, plan.block_rows)
    run(Block(plan, 0, plan.block_rows, first_tile, num_tiles))
    if whole > 1:
        with T.serial(1, whole) as index:
            run(Block(plan, index * plan.block_rows, plan.block_rows, first_tile, num_tiles, is_first=False))
    if last_rows > 0:
        run(Block(plan, plan.rows - last_rows, last_rows, first_tile, num_tiles, is_first=False))


def start_sums(block: Block, plane_offset: Expr) -> Sums:
    """Allocate sums that start at the offset of their plane, which cancels the bias of unsigned weights."""
    biased = block.plan.isa.weight_bias > 0
    return new_sums(block, lambda plane, r: plane_offset[block.plane_row(plane, r)] if biased else 0)


def new_sums(block: Block, first: Callable[[int, int], Expr], *, num_tiles: int | None = None) -> Sums:
    """Allocate the sums of a block, those of a row starting at first(plane, r)."""
    tiles = block.num_tiles if num_tiles is None else num_tiles
    starts = [first(plane, r) for r, plane in product(range(block.num_rows), range(block.plan.planes))]
    return [block.plan.isa.new_sums(starts) for _ in range(tiles)]


def add_int8_products(
    block: Block, sums: Sums, planes: Expr, weight: Expr, first_weight_tile: Expr, next_weight_tile: Expr
) -> None:
    """Add the products of all octets with packed weights [tiles, Kp/4, 64]; prefetch those of the next tiles."""
    bias = block.plan.isa.weight_bias
    with T.serial(block.plan.steps // (2 * _UNROLLED)) as turn:
        parts = [(turn * _UNROLLED + u, part) for u, part in product(range(_UNROLLED), range(2))]
        for (octet, part), t in product(parts, range(block.num_tiles)):
            weights = weight[first_weight_tile + t, octet * 2 + part, lanes(0, VECTOR_BYTES)]
            block.add_products(sums, t, planes, octet, part, rebiased(weights, bias))
        # Last, for between the products a prefetch would keep LLVM from sharing their loads.
        if block.is_first:
            prefetch_steps(weight, next_weight_tile, block.num_tiles, [octet * 2 + part for octet, part in parts])


def add_unpacked_products(block: Block, sums: Sums, planes: Expr, weight: Expr) -> None:
    """Add the products of all octets with weights as `each_int4_part` makes them, [tiles, Kp/4, 64]."""
    with T.serial(block.plan.steps // (2 * _UNROLLED)) as turn:
        for u, part, t in product(range(_UNROLLED), range(2), range(block.num_tiles)):
            octet = turn * _UNROLLED + u
            block.add_products(sums, t, planes, octet, part, weight[t, octet * 2 + part, lanes(0, VECTOR_BYTES)])


def prefetch_steps(weight: Expr, first_tile: Expr, num_tiles: int, steps: list[Expr]) -> None:
    """Ask for some vectors of some tiles; past the last tile this is harmless."""
    for step, t in product(steps, range(num_tiles)):
        prefetch(weight, first_tile + t, step, 0)


def store_sums(block: Block, y: Expr, sums: Sums, channel_scale: Expr, row_scale: Expr) -> None:
    """y = (joined sums * channel_scale) * row_scale"""
    plan = block.plan
    for t in range(block.num_tiles):
        scale = load_edge(plan, channel_scale, block.first_tile + t)
        for r in range(block.num_rows):
            row = block.first_row + r
            value = joined(block.plane_sums(sums, r, t)) * scale[lanes(0)] * splat(row_scale[row])
            store_edge(plan, y, row, block.first_tile + t, value)


def store_edge(plan: Plan, y: Expr, row: Expr, tile: Expr, value: Expr) -> None:
    """y[row, 16*tile + i] = value[i], only as many as there are outputs."""
    if plan.edge_lanes == 0:
        T.buffer_store(y, value, [row, lanes(tile * LANES)])
        return
    with T.If(tile < plan.out_features // LANES):
        with T.Then():
            T.buffer_store(y, value, [row, lanes(tile * LANES)])
        with T.Else():
            edge = new_lanes("float32")
            T.buffer_store(edge, value, [lanes(0)])
            for i in range(plan.edge_lanes):
                T.buffer_store(y, edge[i], [row, tile * LANES + i])


def load_edge(plan: Plan, channel_scale: Expr, tile: Expr) -> Expr:
    """Return the channel scales of a tile in a local buffer, zeros where there are no outputs."""
    scale = new_lanes("float32")
    if plan.edge_lanes == 0:
        T.buffer_store(scale, channel_scale[lanes(tile * LANES)], [lanes(0)])
        return scale
    with T.If(tile < plan.out_features // LANES):
        with T.Then():
            T.buffer_store(scale, channel_scale[lanes(tile * LANES)], [lanes(0)])
        with T.Else():
            T.buffer_store(scale, splat(0.0), [lanes(0)])
            for i in range(plan.edge_lanes):
                T.buffer_store(scale, channel_scale[tile * LANES + i], [i])
    return scale
