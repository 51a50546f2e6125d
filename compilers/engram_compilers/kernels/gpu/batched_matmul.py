# mypy: disable-error-code="valid-type, untyped-decorator"
"""Products of small matrices, one per token: a block of threads a row, a thread a column."""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, fma, own_columns
from engram_compilers.kernels.intrinsics import Expr


def batched_matmul(batch: int, rows: int, inner: int, columns: int) -> tirx.PrimFunc:
    """Build ``(a f32 [B, M, K], b f32 [B, K, N]) -> y f32 [B, M, N]``; sums run over k ascending by fma."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        a: T.Buffer((batch, rows, inner), "float32"),
        b: T.Buffer((batch, inner, columns), "float32"),
        y: T.Buffer((batch, rows, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(batch, "y"):
                for row in blocks.blocks(rows):
                    for thread in blocks.threads():
                        _multiply(a, b, y, token, row, thread)

    return kernel


def _multiply(a: Expr, b: Expr, y: Expr, token: Expr, row: Expr, thread: Expr) -> None:
    with own_columns(int(y.shape[2]), thread) as (_, column):
        total = blocks.local(1, "float32")
        T.buffer_store(total, T.float32(0.0), [0])
        with T.serial(int(a.shape[2])) as k:
            T.buffer_store(total, fma(a[token, row, k], b[token, k, column], total[0]), [0])
        T.buffer_store(y, total[0], [token, row, column])
