# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers on float32 weights: for bundles exported without quantisation, which serve as references."""

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import fma, lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over
from engram_compilers.kernels.packing import Arrays, pad

_WEIGHTS_PER_US = 4000.0


def pack_float(weight: NDArray[np.float32]) -> Arrays:
    """Pack ``[N, K]`` for `linear_float`: ``[Np/16, K, 16]``, lane i of tile t is output 16t + i, padded with zeros."""
    padded = pad(weight, LANES, 1)
    return {"weight": padded.reshape(len(padded) // LANES, LANES, -1).transpose(0, 2, 1).copy()}


def linear_float(rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, K], weight f32 [Np/16, K, 16]) -> y f32 [M, N]``; sums run over k ascending by fma."""
    tiles = -(-out_features // LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, in_features), "float32"),
        weight: T.Buffer((tiles, in_features, LANES), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for tile in loop_over(tiles, rows * out_features * in_features / _WEIGHTS_PER_US):
                sums = T.alloc_local((LANES,), "float32")
                for row in T.serial(rows):
                    sums[lanes(0)] = splat(0.0)
                    for k in T.serial(in_features):
                        sums[lanes(0)] = fma(weight[tile, k, lanes(0)], splat(x[row, k]), sums[lanes(0)])
                    for i in T.serial(T.min(LANES, out_features - tile * LANES)):
                        y[row, tile * LANES + i] = sums[i]

    return kernel
