# mypy: disable-error-code="valid-type, untyped-decorator"
"""Routed mixtures of experts: choosing them, linear layers of the chosen ones, and the mixture.

Pairs, segments and the results of `route` are those of `engram_compilers.kernels.experts`. One block of threads chooses
for all tokens, a thread a token, and its first thread sorts the pairs. A linear layer has a block for each tile of 32
outputs of each segment, which takes the segment's pairs one after the other.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.experts import Routing, Segments
from engram_compilers.kernels.float_linear import FLOAT32
from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, fma, own_columns, quads
from engram_compilers.kernels.gpu.float_linear import float_sums, widened
from engram_compilers.kernels.gpu.linear import int4_sums, int8_sums, joined
from engram_compilers.kernels.gpu.packing import CHUNK, TILE, pack_int4, pack_int8, tiles_of
from engram_compilers.kernels.gpu.products import PARTS, Place, finish
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import round_up
from engram_compilers.kernels.packing import GROUP, Arrays, Bytes, require_groups
from engram_compilers.kernels.quantise import PLANE_MULTIPLE

_LOWEST_KEY = -(2**31)  # below the key of any value, for experts already chosen
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


def route(routing: Routing, *, normalise: bool) -> tirx.PrimFunc:
    """Build the kernel that chooses experts and orders the pairs by them.

    Arguments and results are those of `engram_compilers.kernels.experts.route`; sums run over slots, or all experts,
    ascending.
    """
    tokens, experts, top_k = routing.tokens, routing.experts, routing.top_k

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        logits: T.Buffer((tokens, experts), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((tokens, top_k), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for _ in blocks.blocks(1):
                for thread in blocks.threads():
                    _route(routing, logits, Segments(order, expert, start, count), weight, thread, normalise)

    return kernel


def _route(routing: Routing, logits: Expr, segments: Segments, weight: Expr, thread: Expr, normalise: bool) -> None:
    chosen = blocks.shared((routing.pairs,), "int32")
    with own_columns(routing.tokens, thread) as (_, token):
        keys = blocks.local(routing.experts, "int32")
        with T.serial(routing.experts) as e:
            T.buffer_store(keys, _key(logits[token, e]), [e])
        with T.serial(routing.top_k) as slot:
            best = T.Bind(_first_of_largest(keys, routing.experts))
            T.buffer_store(chosen, best, [token * routing.top_k + slot])
            T.buffer_store(weight, logits[token, best], [token, slot])
            T.buffer_store(keys, T.int32(_LOWEST_KEY), [best])
        _weigh(routing, logits, weight, token, normalise)
    blocks.synchronise()
    with T.If(thread == 0), T.Then():
        _order_by_expert(routing, chosen, segments)


def _key(logit: Expr) -> Expr:
    """Return an integer that orders as the logit does; that of a NaN is the largest, to be seen."""
    bits = T.Bind(T.reinterpret("int32", logit))
    magnitude = T.Bind(T.bitwise_and(bits, T.int32(_MAGNITUDE)))
    key = T.Select(bits < 0, T.int32(0) - magnitude, magnitude)
    return T.Select(magnitude > T.int32(_INFINITY), T.int32(_MAGNITUDE), key)


def _first_of_largest(keys: Expr, count: int) -> Expr:
    """Return the lowest index of the largest key."""
    best = blocks.local(1, "int32")
    T.buffer_store(best, T.int32(0), [0])
    with T.serial(count) as e, T.If(keys[e] > keys[best[0]]), T.Then():
        T.buffer_store(best, e, [0])
    return best[0]


def _weigh(routing: Routing, logits: Expr, weight: Expr, token: Expr, normalise: bool) -> None:
    """Turn a token's chosen logits, the largest first, into their shares of the softmax over them, or over all."""
    largest = T.Bind(weight[token, 0])
    total = blocks.local(1, "float32")
    T.buffer_store(total, T.float32(0.0), [0])
    if not normalise:
        with T.serial(routing.experts) as e:
            T.buffer_store(total, total[0] + T.exp(logits[token, e] - largest), [0])
    with T.serial(routing.top_k) as slot:
        decay = T.Bind(T.exp(weight[token, slot] - largest))
        T.buffer_store(weight, decay, [token, slot])
        if normalise:
            T.buffer_store(total, total[0] + decay, [0])
    with T.serial(routing.top_k) as slot:
        T.buffer_store(weight, weight[token, slot] / total[0], [token, slot])


def _order_by_expert(routing: Routing, chosen: Expr, segments: Segments) -> None:
    """Sort the pairs by counting; ``place`` is first the pairs of an expert, then where its next one goes."""
    place = blocks.local(routing.experts, "int32")
    found = blocks.local(2, "int32")  # segments so far, pairs in them
    with T.serial(routing.experts) as e:
        T.buffer_store(place, T.int32(0), [e])
    with T.serial(routing.pairs) as pair:
        T.buffer_store(place, place[chosen[pair]] + 1, [chosen[pair]])
    for i in range(2):
        T.buffer_store(found, T.int32(0), [i])
    with T.serial(routing.experts) as e, T.If(place[e] > 0), T.Then():
        size = T.Bind(place[e])
        T.buffer_store(segments.expert, e, [found[0]])
        T.buffer_store(segments.start, found[1], [found[0]])
        T.buffer_store(place, found[1], [e])
        T.buffer_store(found, found[0] + 1, [0])
        T.buffer_store(found, found[1] + size, [1])
    T.buffer_store(segments.count, found[0], [0])
    T.buffer_store(segments.expert, segments.expert[0], [found[0]])
    T.buffer_store(segments.start, found[1], [found[0]])
    with T.serial(routing.pairs) as pair:
        expert = T.Bind(chosen[pair])
        T.buffer_store(segments.order, pair, [place[expert]])
        T.buffer_store(place, place[expert] + 1, [expert])


def combine(routing: Routing, columns: int) -> tirx.PrimFunc:
    """Build ``(y f32 [P, D], weight f32 [T, k]) -> out f32 [T, D]``, out[t] = sum_j weight[t, j] * y[t * k + j].

    Slots ascending, by fma from 0.
    """

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        y: T.Buffer((routing.pairs, columns), "float32"),
        weight: T.Buffer((routing.tokens, routing.top_k), "float32"),
        out: T.Buffer((routing.tokens, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(routing.tokens):
                for thread in blocks.threads():
                    _combine(y, weight, out, token, thread)

    return kernel


def _combine(y: Expr, weight: Expr, out: Expr, token: Expr, thread: Expr) -> None:
    top_k = int(weight.shape[1])
    with own_columns(int(out.shape[1]), thread) as (_, column):
        total = blocks.local(1, "float32")
        T.buffer_store(total, T.float32(0.0), [0])
        with T.serial(top_k) as slot:
            T.buffer_store(total, fma(weight[token, slot], y[token * top_k + slot, column], total[0]), [0])
        T.buffer_store(out, total[0], [token, column])


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
