# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers and embeddings on float weights, kept as bfloat16 where they all are.

Order: part p of 8 takes inputs p, p + 8, ... ascending by fma, and the parts are added ascending.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.float_linear import FLOAT32
from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, fma, own_columns
from engram_compilers.kernels.gpu.packing import TILE, tiled_groups, tiles_of
from engram_compilers.kernels.gpu.products import MOST_ROWS, PARTS, Place, each_chunk, finish, zeros
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import largest_divisor
from engram_compilers.kernels.packing import Arrays, require_indexable


def pack_float(weight: NDArray[np.float32], dtype: str = FLOAT32) -> Arrays:
    """Pack ``[N, K]`` for `linear_float`: ``[Np/32, K, 32]``, N rounded up to 32 with zeros.

    Args:
        dtype: that of the result, as `engram_compilers.kernels.float_linear.float_dtype` returns it.
    """
    return {"weight": tiled_groups(weight if dtype == FLOAT32 else weight.view(np.uint16)[:, 1::2])}


def widened(weight: Expr, dtype: str) -> Expr:
    """Return a packed weight as float32."""
    if dtype == FLOAT32:
        return weight
    return T.reinterpret("float32", T.shift_left(T.cast(weight, "uint32"), T.uint32(16)))


def linear_float(rows: int, out_features: int, in_features: int, dtype: str) -> tirx.PrimFunc:
    """Build ``(x f32 [M, K], weight [Np/32, K, 32] of dtype) -> y f32 [M, N]``."""
    tiles = tiles_of(out_features)
    together = largest_divisor(rows, MOST_ROWS)
    require_indexable("the weight", tiles, in_features, TILE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, in_features), "float32"),
        weight: T.Buffer((tiles, in_features, TILE), dtype),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for block in blocks.blocks(rows // together, "y"):
                for tile in blocks.blocks(tiles):
                    for part in blocks.threads(PARTS, "y"):
                        for lane in blocks.threads(TILE):
                            _linear_float(Place(tile, block * together, together, lane, part), x, weight, y)

    return kernel


def _linear_float(place: Place, x: Expr, weight: Expr, y: Expr) -> None:
    sums = float_sums(place, x, lambda k: widened(weight[place.tile, k, place.lane], weight.dtype))

    def store(row: Expr, totals: Sequence[Expr]) -> None:
        with T.If(place.output < y.shape[1]), T.Then():
            T.buffer_store(y, totals[0], [row, place.output])

    finish(place, sums, "float32", store)


def float_sums(place: Place, x: Expr, load: Callable[[Expr], Expr]) -> Sequence[Expr]:
    """Return the thread's sums of products, of each row; ``load(input)`` is a weight."""
    sums = zeros(place.count, "float32")

    def add(k: Expr) -> None:
        value = T.Bind(load(k))
        for row in range(place.count):
            T.buffer_store(sums, fma(value, x[place.first_row + row, k], sums[row]), [row])

    each_chunk(int(x.shape[1]), place.part, add)
    return [sums[row] for row in range(place.count)]


def embed_float(tokens: int, vocabulary: int, columns: int, dtype: str) -> tirx.PrimFunc:
    """Build ``(token_ids i64 [T], weight [Vp/32, D, 32] of dtype) -> x f32 [T, D]``, packed by `pack_float`.

    Ids must be in 0..V-1: the runtime checks them.
    """
    tiles = tiles_of(vocabulary)
    require_indexable("the embedding", tiles, columns, TILE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        token_ids: T.Buffer((tokens,), "int64"),
        weight: T.Buffer((tiles, columns, TILE), dtype),
        x: T.Buffer((tokens, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(tokens):
                for thread in blocks.threads():
                    _embed(token_ids, weight, x, token, thread)

    return kernel


def _embed(token_ids: Expr, weight: Expr, x: Expr, token: Expr, thread: Expr) -> None:
    row = T.Bind(T.cast(token_ids[token], "int32"))
    with own_columns(int(x.shape[1]), thread) as (_, column):
        T.buffer_store(x, widened(weight[row // TILE, column, row % TILE], weight.dtype), [token, column])
