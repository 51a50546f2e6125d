# mypy: disable-error-code="valid-type, untyped-decorator"
"""Root mean square normalisation of rows."""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import fma, lane_sum, lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over

_VALUES_PER_US = 8000.0


def rms_norm(rows: int, columns: int, eps: float, branches: int = 1) -> tirx.PrimFunc:
    """Build ``(x f32 [M, D], gain f32 [G * D]) -> y f32 [M, D]``: x * (1 / sqrt(mean(x^2) + eps)) * gain[row % G].

    Order: lane i sums columns i, i+16, i+32, ... ascending by fma, then the tree of `lane_sum`;
    the mean and eps are joined by one fma, sum * (1/D) + eps.
    """
    whole, rest = divmod(columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, columns), "float32"),
        gain: T.Buffer((branches * columns,), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _VALUES_PER_US):
                first: T.let = T.floormod(row, branches) * columns
                squares = T.alloc_local((LANES,), "float32")
                squares[lanes(0)] = splat(0.0)
                for step in T.serial(whole):
                    value: T.let = x[row, lanes(step * LANES)]
                    squares[lanes(0)] = fma(value, value, squares[lanes(0)])
                for i in T.unroll(rest):
                    edge: T.let = x[row, whole * LANES + i]
                    squares[i] = fma(edge, edge, squares[i])
                mean: T.let = fma(lane_sum(squares[lanes(0)]), T.float32(1.0 / columns), T.float32(eps))
                factor: T.let = T.float32(1.0) / T.sqrt(mean)
                for step in T.serial(whole):
                    y[row, lanes(step * LANES)] = (
                        x[row, lanes(step * LANES)] * splat(factor) * gain[lanes(first + step * LANES)]
                    )
                for i in T.unroll(rest):
                    y[row, whole * LANES + i] = x[row, whole * LANES + i] * factor * gain[first + whole * LANES + i]

    return kernel
