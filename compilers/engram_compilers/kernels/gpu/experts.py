# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers of routed experts: a block for each tile of 32 outputs of each segment, which takes its pairs in turn.

Pairs and segments are those of `engram_compilers.kernels.experts`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.experts import Routing, Segments
from engram_compilers.kernels.float_linear import FLOAT32
from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, quads
from engram_compilers.kernels.gpu.float_linear import float_sums, widened
from engram_compilers.kernels.gpu.linear import int4_sums, int8_sums, joined
from engram_compilers.kernels.gpu.packing import CHUNK, TILE, pack_int4, pack_int8, tiles_of
from engram_compilers.kernels.gpu.products import PARTS, Place, finish
from engram_compilers.kernels.gpu.routing import combine, route
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import round_up
from engram_compilers.kernels.packing import GROUP, Arrays, Bytes, require_groups
from engram_compilers.kernels.quantise import PLANE_MULTIPLE

__all__ = [
    "combine",
    "expert_linear_float",
    "expert_linear_int4",
    "expert_linear_int8",
    "pack_expert_int4",
    "pack_expert_int8",
    "route",
]


def pack_expert_int8(weight: Bytes, scale: NDArray[np.float32]) -> Arrays:
    """Pack one expert's weight as `packing.pack_int8` does, and ``scale [N]``; experts follow one another."""
    return {**pack_int8(weight), "scale": scale}


def pack_expert_int4(codes: Bytes, multiplier: Bytes, zero: Bytes, scale: NDArray[np.float32]) -> Arrays:
    """Pack one expert's weight as `packing.pack_int4` does, and ``scale [N]``; experts follow one another."""
    return {**pack_int4(codes, multiplier, zero), "scale": scale}


def expert_linear_int8(routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build the linear layer of the chosen experts on int8 weights, packed by `pack_expert_int8`.

    ``(planes i8 [2M, Kp], row_scale f32 [M], order, expert, start, count, weight i8 [E * Np/32, Kp/16, 32, 16],
    scale f32 [E * N]) -> y f32 [P, N]``: row p of y is what `linear.linear_int8` makes of row p / (P / M) of x and the
    weight of p's expert; M is T or P.
    """
    padded, tiles = round_up(in_features, PLANE_MULTIPLE), tiles_of(out_features)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((routing.experts * tiles, padded // CHUNK, TILE, CHUNK), "int8"),
        scale: T.Buffer((routing.experts * out_features,), "float32"),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for segment in blocks.blocks(routing.segments, "y"):
                for tile in blocks.blocks(tiles):
                    for part in blocks.threads(PARTS, "y"):
                        for lane in blocks.threads(TILE):
                            _expert_int8(
                                _Block(routing, Segments(order, expert, start, count), segment, tile, lane, part),
                                planes,
                                row_scale,
                                weight,
                                scale,
                                y,
                            )

    return kernel


class _Block:
    """A thread's place in the block of a tile of a segment's expert."""

    def __init__(self, routing: Routing, segments: Segments, segment: Expr, tile: Expr, lane: Expr, part: Expr) -> None:
        self._routing = routing
        self._segments = segments
        self._tile, self._lane, self._part = tile, lane, part
        self._used = T.Bind(segment < segments.count[0])
        self._segment = segment
        self._expert = T.Bind(T.Select(self._used, segments.expert[segment], 0))

    def row(self, each: int) -> Expr:
        """Return where the tile lies in a weight of ``each`` tiles an expert; 64 bits, for large ones."""
        return T.Bind(T.cast(self._expert, "int64") * T.int64(each) + T.cast(self._tile, "int64"))

    def scale_place(self, place: Place, outputs: int) -> Expr:
        return self._expert * outputs + place.output

    def each_pair(self, rows: int, run: Callable[[Place, Expr], None]) -> None:
        """Emit run(place of the pair's row, pair) for the pairs of the segment, none for one that isn't used."""
        start = self._segments.start
        first = T.Bind(T.Select(self._used, start[self._segment], 0))
        size = T.Bind(T.Select(self._used, start[self._segment + 1], 0) - first)
        per_row = self._routing.pairs // rows
        with T.serial(size) as index:
            pair = T.Bind(self._segments.order[first + index])
            run(Place(self._tile, T.Bind(pair // per_row), 1, self._lane, self._part), pair)
            blocks.synchronise()  # or the next pair's parts could be written before this one's are read


def _expert_int8(block: _Block, planes: Expr, row_scale: Expr, weight: Expr, scale: Expr, y: Expr) -> None:
    rows = int(row_scale.shape[0])
    tile = block.row(tiles_of(int(y.shape[1])))

    def run(place: Place, pair: Expr) -> None:
        sums = int8_sums(place, planes, rows, lambda chunk, quad: weight[tile, chunk, place.lane, quads(quad)])
        _finish_pair(block, place, pair, sums, row_scale, scale, y)

    block.each_pair(rows, run)


def _finish_pair(
    block: _Block, place: Place, pair: Expr, sums: Sequence[Expr], row_scale: Expr, scale: Expr, y: Expr
) -> None:
    outputs = int(y.shape[1])

    def store(row: Expr, totals: Sequence[Expr]) -> None:
        with T.If(place.output < outputs), T.Then():
            value = joined(totals) * scale[block.scale_place(place, outputs)] * row_scale[row]
            T.buffer_store(y, value, [pair, place.output])

    finish(place, sums, "int32", store)


def expert_linear_int4(routing: Routing, rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build `expert_linear_int8` for two-level int4 weights, packed by `pack_expert_int4`.

    ``(planes i8 [2M, Kp], row_scale f32 [M], order, expert, start, count, codes u8 [E * Np/32, Kp/32, 32, 16],
    header u8 [E * Np/32, Kp/32, 32], scale f32 [E * N]) -> y f32 [P, N]``.
    """
    padded, tiles = round_up(in_features, PLANE_MULTIPLE), tiles_of(out_features)
    require_groups(in_features)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        codes: T.Buffer((routing.experts * tiles, padded // GROUP, TILE, CHUNK), "uint8"),
        header: T.Buffer((routing.experts * tiles, padded // GROUP, TILE), "uint8"),
        scale: T.Buffer((routing.experts * out_features,), "float32"),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for segment in blocks.blocks(routing.segments, "y"):
                for tile in blocks.blocks(tiles):
                    for part in blocks.threads(PARTS, "y"):
                        for lane in blocks.threads(TILE):
                            _expert_int4(
                                _Block(routing, Segments(order, expert, start, count), segment, tile, lane, part),
                                planes,
                                row_scale,
                                codes,
                                header,
                                scale,
                                y,
                            )

    return kernel


def _expert_int4(block: _Block, planes: Expr, row_scale: Expr, codes: Expr, header: Expr, scale: Expr, y: Expr) -> None:
    rows = int(row_scale.shape[0])
    tile = block.row(tiles_of(int(y.shape[1])))

    def run(place: Place, pair: Expr) -> None:
        sums = int4_sums(
            place,
            planes,
            rows,
            lambda group, quad: codes[tile, group, place.lane, quads(quad)],
            lambda group: header[tile, group, place.lane],
        )
        _finish_pair(block, place, pair, sums, row_scale, scale, y)

    block.each_pair(rows, run)


def expert_linear_float(
    routing: Routing, rows: int, out_features: int, in_features: int, dtype: str = FLOAT32
) -> tirx.PrimFunc:
    """Build the linear layer of the chosen experts on float weights, each packed by `float_linear.pack_float`.

    ``(x f32 [M, K], order, expert, start, count, weight [E * Np/32, K, 32] of dtype) -> y f32 [P, N]``: row p of y is
    row p / (P / M) of x times the weight of p's expert, summed as in `float_linear`.
    """
    tiles = tiles_of(out_features)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, in_features), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((routing.experts * tiles, in_features, TILE), dtype),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for segment in blocks.blocks(routing.segments, "y"):
                for tile in blocks.blocks(tiles):
                    for part in blocks.threads(PARTS, "y"):
                        for lane in blocks.threads(TILE):
                            _expert_float(
                                _Block(routing, Segments(order, expert, start, count), segment, tile, lane, part),
                                x,
                                weight,
                                y,
                            )

    return kernel


def _expert_float(block: _Block, x: Expr, weight: Expr, y: Expr) -> None:
    tile = block.row(tiles_of(int(y.shape[1])))

    def run(place: Place, pair: Expr) -> None:
        def store(_: Expr, totals: Sequence[Expr]) -> None:
            with T.If(place.output < y.shape[1]), T.Then():
                T.buffer_store(y, totals[0], [pair, place.output])

        sums = float_sums(place, x, lambda k: widened(weight[tile, k, place.lane], weight.dtype))
        finish(place, sums, "float32", store)

    block.each_pair(int(x.shape[0]), run)
