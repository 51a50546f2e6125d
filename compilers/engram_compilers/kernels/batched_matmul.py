# mypy: disable-error-code="valid-type, untyped-decorator"
"""Products of small matrices, one per token: residual streams mixed by coefficients of their own."""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import fma, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over

_PRODUCTS_PER_US = 8000.0


def batched_matmul(batch: int, rows: int, inner: int, columns: int) -> tirx.PrimFunc:
    """Build ``(a f32 [B, M, K], b f32 [B, K, N]) -> y f32 [B, M, N]``; sums run over k ascending by fma."""
    whole, rest = divmod(columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        a: T.Buffer((batch, rows, inner), "float32"),
        b: T.Buffer((batch, inner, columns), "float32"),
        y: T.Buffer((batch, rows, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(batch, batch * rows * inner * columns / _PRODUCTS_PER_US):
                sums = new_lanes("float32")
                for row, step in T.grid(rows, whole):
                    sums[lanes(0)] = splat(0.0)
                    for k in T.unroll(inner):
                        value: T.let = b[token, k, lanes(step * LANES)]
                        sums[lanes(0)] = fma(splat(a[token, row, k]), value, sums[lanes(0)])
                    y[token, row, lanes(step * LANES)] = sums[lanes(0)]
                for row, i in T.grid(rows, rest):
                    sums[0] = T.float32(0.0)
                    for k in T.unroll(inner):
                        sums[0] = fma(a[token, row, k], b[token, k, whole * LANES + i], sums[0])
                    y[token, row, whole * LANES + i] = sums[0]

    return kernel
