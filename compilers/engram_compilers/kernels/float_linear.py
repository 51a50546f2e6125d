# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers and embeddings on float weights, kept as bfloat16 where they all are.

A bfloat16 is the upper half of a float32, so widening it loses nothing: either way the results have the same bits.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, fma, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, largest_divisor, loop_over, round_up
from engram_compilers.kernels.packing import Arrays, pad, require_indexable

FLOAT32, BFLOAT16 = "float32", "uint16"  # dtypes of packed weights; numpy has no bfloat16
_WEIGHTS_PER_US = 4000.0
_EMBEDDED_PER_US = 500.0
_ROWS_TOGETHER = 8  # rows that share each load of a weight
_SUMS_TOGETHER = 16  # vectors of sums kept in registers
_TILES_TOGETHER = 4  # streams of weights read at once

_Sums = dict[tuple[int, int], Expr]  # (row of the block, tile of the block) -> float32 [16]


def float_dtype(weight: NDArray[np.float32]) -> str:
    """Return `BFLOAT16` if every weight is one, else `FLOAT32`."""
    lower_halves = weight.view(np.uint16)[..., ::2]
    return FLOAT32 if lower_halves.any() else BFLOAT16


def pack_float(weight: NDArray[np.float32], dtype: str = FLOAT32) -> Arrays:
    """Pack ``[N, K]`` for `linear_float`: ``[Np/16, K, 16]``, lane i of tile t is output 16t + i, padded with zeros.

    Args:
        dtype: that of the result, as `float_dtype` returns it.
    """
    stored = weight if dtype == FLOAT32 else weight.view(np.uint16)[:, 1::2]
    padded = pad(stored, LANES, 1)
    return {"weight": padded.reshape(len(padded) // LANES, LANES, -1).transpose(0, 2, 1).copy()}


def widened(weights: Expr, dtype: str) -> Expr:
    """Return a vector of 16 packed weights as float32."""
    if dtype == FLOAT32:
        return weights
    return T.reinterpret("float32x16", T.shift_left(T.cast(weights, "uint32x16"), T.broadcast(T.uint32(16), LANES)))


def _widened_one(weight: Expr, dtype: str) -> Expr:
    if dtype == FLOAT32:
        return weight
    return T.reinterpret("float32", T.shift_left(T.cast(weight, "uint32"), T.uint32(16)))


def linear_float(rows: int, out_features: int, in_features: int, dtype: str) -> tirx.PrimFunc:
    """Build ``(x f32 [M, K], weight [Np/16, K, 16] of dtype) -> y f32 [M, N]``; sums run over k ascending by fma."""
    tiles = round_up(out_features, LANES) // LANES
    together = largest_divisor(rows, _ROWS_TOGETHER)
    wide = largest_divisor(tiles, min(_TILES_TOGETHER, _SUMS_TOGETHER // together))
    require_indexable("the weight", tiles, in_features, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, in_features), "float32"),
        weight: T.Buffer((tiles, in_features, LANES), dtype),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for group in loop_over(tiles // wide, rows * out_features * in_features / _WEIGHTS_PER_US):
                for block in T.serial(rows // together):
                    _compute_block(x, weight, y, block * together, together, group * wide, wide)

    return kernel


def _compute_block(x: Expr, weight: Expr, y: Expr, first_row: Expr, rows: int, first_tile: Expr, tiles: int) -> None:
    """Compute a block of y; not in the kernel itself, whose parser takes no dict of buffers."""
    _store(y, _products(x, weight, first_row, rows, first_tile, tiles), first_row, first_tile)


def _products(x: Expr, weight: Expr, first_row: Expr, rows: int, first_tile: Expr, tiles: int) -> _Sums:
    """Return the sums of a block: by row and tile, f32 [16]."""
    sums = {place: new_lanes("float32") for place in product(range(rows), range(tiles))}
    for total in sums.values():
        T.buffer_store(total, splat(0.0), [lanes(0)])
    with T.serial(int(x.shape[1])) as k:
        loaded = [T.Bind(widened(weight[first_tile + t, k, lanes(0)], weight.dtype)) for t in range(tiles)]
        for (r, t), total in sums.items():
            T.buffer_store(total, fma(loaded[t], splat(x[first_row + r, k]), total[lanes(0)]), [lanes(0)])
    return sums


def _store(y: Expr, sums: _Sums, first_row: Expr, first_tile: Expr) -> None:
    edge = new_lanes("float32")  # or the sums would be memory, for only that has a lane i
    for (r, t), total in sums.items():
        output = (first_tile + t) * LANES
        T.buffer_store(edge, total[lanes(0)], [lanes(0)])
        with T.serial(T.min(LANES, y.shape[1] - output)) as i:
            T.buffer_store(y, edge[i], [first_row + r, output + i])


def embed_float(tokens: int, vocabulary: int, columns: int, dtype: str) -> tirx.PrimFunc:
    """Build ``(token_ids i64 [T], weight [Vp/16, D, 16] of dtype) -> x f32 [T, D]``, packed by `pack_float`.

    Ids must be in 0..V-1: the runtime checks them.
    """
    tiles = round_up(vocabulary, LANES) // LANES
    require_indexable("the embedding", tiles, columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        token_ids: T.Buffer((tokens,), "int64"),
        weight: T.Buffer((tiles, columns, LANES), dtype),
        x: T.Buffer((tokens, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * columns / _EMBEDDED_PER_US):
                row: T.let = T.cast(token_ids[token], "int32")
                for d in T.serial(columns):
                    stored: T.let = weight[row // LANES, d, row % LANES]
                    x[token, d] = _widened_one(stored, dtype)

    return kernel
