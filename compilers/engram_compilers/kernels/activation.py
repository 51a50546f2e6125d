# mypy: disable-error-code="valid-type, untyped-decorator"
"""Element-wise kernels between the linear layers."""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, exp16, lanes, let, splat
from engram_compilers.kernels.loops import LANES, loop_over

_SILU_VALUES_PER_US = 2500.0
_ADDED_VALUES_PER_US = 8000.0


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + exp(-x)) of 16 lanes; exp only ever sees -|x|, so nothing overflows."""

    def quotient(decay: Expr, x: Expr) -> Expr:
        return T.Select(x >= splat(0.0), splat(1.0), decay) / (decay + splat(1.0))

    return let(x, lambda x: let(exp16(splat(0.0) - T.fabs(x)), lambda decay: quotient(decay, x)))


def silu(gate: Expr) -> Expr:
    """Return gate * sigmoid(gate) of 16 lanes."""
    return let(gate, lambda x: x * sigmoid(x))


def silu_mul(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``(gate_up f32 [M, 2F]) -> y f32 [M, F]``, y = silu(gate) * up; the gate is the first half of a row."""
    whole, rest = divmod(columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        gate_up: T.Buffer((rows, 2 * columns), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _SILU_VALUES_PER_US):
                edge = T.alloc_local((LANES,), "float32")
                for step in T.serial(whole):
                    y[row, lanes(step * LANES)] = (
                        silu(gate_up[row, lanes(step * LANES)]) * gate_up[row, lanes(columns + step * LANES)]
                    )
                if rest > 0:
                    edge[lanes(0)] = splat(0.0)
                    for i in T.serial(rest):
                        edge[i] = gate_up[row, whole * LANES + i]
                    edge[lanes(0)] = silu(edge[lanes(0)])
                    for i in T.serial(rest):
                        y[row, whole * LANES + i] = edge[i] * gate_up[row, columns + whole * LANES + i]

    return kernel


def add(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``(a f32 [M, D], b f32 [M, D]) -> y f32 [M, D]``, y = a + b."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        a: T.Buffer((rows, columns), "float32"),
        b: T.Buffer((rows, columns), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _ADDED_VALUES_PER_US):
                for column in T.serial(columns):
                    y[row, column] = a[row, column] + b[row, column]

    return kernel
