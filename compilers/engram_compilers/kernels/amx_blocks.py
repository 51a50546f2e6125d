# mypy: disable-error-code="valid-type"
"""How `amx` cuts a linear layer into tiles.

Four of the eight tile registers hold sums: of one tile of activations with four of weights, or of two with two. A tile
of activations is up to 16 plane rows by 64 inputs, read where `quantise_rows` has put them; a tile of weights is 64
inputs by 16 outputs, which is 16 vectors of `vnni_layout` as they stand. Weights are biased like those of VNNI, and
the planes' offsets are added to the finished sums: modulo 2**32 that is the same.

Blocking follows measurements of like kernels on Sapphire Rapids (DESIGN.md); these have not been timed on AMX.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import (
    TILE_BYTES,
    TILE_ROWS,
    Expr,
    dot_tiles,
    lanes,
    load_tile,
    shape_tiles,
    splat,
    store_tile,
    zero_tile,
)
from engram_compilers.kernels.loops import LANES
from engram_compilers.kernels.packing import INT8_BIAS
from engram_compilers.kernels.quantise import joined
from engram_compilers.kernels.vnni_blocks import Plan, prefetch_steps, store_edge
from engram_compilers.kernels.vnni_layout import DOTS, STEP, VECTOR_BYTES, code_vectors, each_int4_part

TILE_STEPS = TILE_BYTES // STEP  # steps in a tile of weights
WEIGHTS_PER_US = 15_000.0  # from memory
PRODUCTS_PER_US = 1_000_000.0  # of a weight and an 8-bit activation

_SUMS = 4
_ALTERNATING = 2 * TILE_STEPS  # steps of scratch for weights in use and those unpacked next

Place = tuple[Expr, Sequence[Expr]]  # a buffer and indices into it
Weights = Callable[[Expr], Sequence[Place]]  # a tile's place among the inputs -> where its tiles of weights are


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the tile registers are shared: sums first, then activations, weights in the rest.

    row_tiles: tiles of activations, 1 or 2. rows: rows of planes in each.
    """

    row_tiles: int
    rows: int

    @property
    def weight_tiles(self) -> int:
        """Tiles of weights that all tiles of activations are multiplied with."""
        return _SUMS // self.row_tiles

    def configure(self) -> None:
        """Give the registers of the running thread their shapes."""
        activations, weights = (self.rows, TILE_BYTES), (TILE_ROWS, TILE_BYTES)
        shape_tiles([activations] * (_SUMS + self.row_tiles) + [weights] * (_SUMS - self.row_tiles))

    def new_sums(self) -> Expr:
        """Allocate int32 [weight tiles, plane rows, 16]."""
        return T.alloc_buffer((self.weight_tiles, self.row_tiles * self.rows, LANES), "int32")

    def multiply(self, sums: Expr, planes: Expr, first_rows: Sequence[Expr], num_tiles: int, weights: Weights) -> None:
        """Write the products of all inputs to ``sums``; row tile q begins at row ``first_rows[q]`` of ``planes``."""
        every = list(product(range(num_tiles), range(self.row_tiles)))
        for t, q in every:
            zero_tile(self._sum(t, q))
        with T.serial(planes.shape[1] // TILE_BYTES) as place:
            self._add_products(planes, first_rows, place, weights(place))
        for t, q in every:
            store_tile(self._sum(t, q), sums, [t, q * self.rows, 0], LANES * 4)

    def _add_products(self, planes: Expr, first_rows: Sequence[Expr], place: Expr, weights: Sequence[Place]) -> None:
        for q, row in enumerate(first_rows):
            load_tile(_SUMS + q, planes, [row, place * TILE_BYTES], planes.shape[1])
        for t, (buffer, indices) in enumerate(weights):
            weight = _SUMS + self.row_tiles + t % (_SUMS - self.row_tiles)
            load_tile(weight, buffer, indices, VECTOR_BYTES)
            for q in range(self.row_tiles):
                dot_tiles(self._sum(t, q), _SUMS + q, weight)

    def _sum(self, t: int, q: int) -> int:
        return t * self.row_tiles + q


def stored_weights(weight: Expr, first_tile: Expr, num_tiles: int) -> Weights:
    """Take tiles from a buffer laid out [tiles, Kp/4, 64]."""
    return lambda place: [(weight, [first_tile + t, place * TILE_STEPS, 0]) for t in range(num_tiles)]


def fetched_weights(weight: Expr, first_tile: Expr, num_tiles: int, next_tile: Expr) -> Weights:
    """As `stored_weights`, prefetching those of the next tiles."""

    def weights(place: Expr) -> Sequence[Place]:
        prefetch_steps(weight, next_tile, num_tiles, [place * TILE_STEPS + s for s in range(TILE_STEPS)])
        return stored_weights(weight, first_tile, num_tiles)(place)

    return weights


def unpacked_weights(
    scratch: Expr, codes: Expr, header: Expr, first_tile: Expr, num_tiles: int, next_tile: Expr
) -> Weights:
    """Unpack two-level int4 to ``scratch [tiles, steps, 64]``, the least of whose steps are those of two tiles."""

    def weights(place: Expr) -> Sequence[Place]:
        for t, group in product(range(num_tiles), (2 * place, 2 * place + 1)):

            def keep(octet: Expr, part: int, vector: Expr, t: int = t) -> None:
                step = octet * 2 + part
                T.buffer_store(scratch, vector, [t, step % scratch.shape[1], lanes(0, VECTOR_BYTES)])

            each_int4_part(codes, header, first_tile + t, group, keep, layout=DOTS, bias=INT8_BIAS)
            prefetch_steps(codes, next_tile + t, 1, code_vectors(group, 4))
        return [(scratch, [t, place * TILE_STEPS % scratch.shape[1], 0]) for t in range(num_tiles)]

    return weights


def new_scratch(num_tiles: int, steps: int, *, read_again: bool) -> Expr:
    """Allocate bytes for unpacked weights: of all inputs if they are ``read_again``, else of those in work."""
    return T.alloc_buffer((num_tiles, steps if read_again else _ALTERNATING, VECTOR_BYTES), "uint8")


def store_row(
    plan: Plan,
    y: Expr,
    y_row: Expr,
    first_tile: Expr,
    planes: Sequence[Sequence[Expr]],
    channel_scales: Sequence[Expr],
    row_scale: Expr,
) -> None:
    """y = (sum * channel_scale) * row_scale; ``planes[p][t]`` is the int32x16 sum of a plane and tile."""
    for t, channel_scale in enumerate(channel_scales):
        value = joined([plane[t] for plane in planes]) * channel_scale * splat(row_scale)
        store_edge(plan, y, y_row, first_tile + t, value)
