# mypy: disable-error-code="valid-type, untyped-decorator"
"""Element-wise kernels between the linear layers."""

import math
from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, exp16, fma, lanes, let, new_lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.quantise import PLANE_MULTIPLE, QuantisedRows, padded_row

_EXP_VALUES_PER_US = 2500.0
_ADDED_VALUES_PER_US = 8000.0
_TWICE_SQRT_2_OVER_PI = 1.5957691216057308
_GELU_CUBE = 0.044715

Function = Callable[[Expr], Expr]  # of float32x16


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + exp(-x)) of 16 lanes; exp only ever sees -|x|, so nothing overflows."""

    def quotient(decay: Expr, x: Expr) -> Expr:
        value = T.Select(x >= splat(0.0), splat(1.0), decay) / (decay + splat(1.0))
        return T.Select(T.fabs(x) <= splat(math.inf), value, x)  # a nan stays one

    return let(x, lambda x: let(exp16(splat(0.0) - T.fabs(x)), lambda decay: quotient(decay, x)))


def silu(gate: Expr) -> Expr:
    """Return gate * sigmoid(gate) of 16 lanes."""
    return let(gate, lambda x: x * sigmoid(x))


def gelu(gate: Expr) -> Expr:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which is x * sigmoid of twice that argument."""

    def slope(x: Expr) -> Expr:
        return fma(x * x, splat(_TWICE_SQRT_2_OVER_PI * _GELU_CUBE), splat(_TWICE_SQRT_2_OVER_PI))

    return let(gate, lambda x: x * sigmoid(x * slope(x)))


def tanh(x: Expr) -> Expr:
    """Return tanh(x) to about 1e-7, also near 0; exp only ever sees -2|x|."""

    def signed(x: Expr, decay: Expr) -> Expr:
        size = (splat(1.0) - decay) / (splat(1.0) + decay)
        value = let(size, lambda size: T.Select(x >= splat(0.0), size, splat(0.0) - size))
        return T.Select(T.fabs(x) <= splat(math.inf), value, x)  # a nan stays one

    return let(x, lambda x: let(exp16(splat(-2.0) * T.fabs(x)), lambda decay: signed(x, decay)))


GATES: Mapping[str, Function] = {"silu": silu, "gelu": gelu}


def each(size: int, function: Function) -> tirx.PrimFunc:
    """Build ``(x f32 [N]) -> y f32 [N]``, y = function(x)."""
    whole, rest = divmod(size, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((size,), "float32"), y: T.Buffer((size,), "float32")) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            edge = new_lanes("float32")
            for step in loop_over(whole, size / _EXP_VALUES_PER_US):
                y[lanes(step * LANES)] = function(x[lanes(step * LANES)])
            if rest > 0:
                edge[lanes(0)] = splat(0.0)
                for i in T.serial(rest):
                    edge[i] = x[whole * LANES + i]
                edge[lanes(0)] = function(edge[lanes(0)])
                for i in T.serial(rest):
                    y[whole * LANES + i] = edge[i]

    return kernel


def gated(rows: int, columns: int, function: Function) -> tirx.PrimFunc:
    """Build ``(gate_up f32 [M, 2F]) -> y f32 [M, F]``, y = function(gate) * up; the gate is the first half of a row."""
    whole, rest = divmod(columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        gate_up: T.Buffer((rows, 2 * columns), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _EXP_VALUES_PER_US):
                edge = new_lanes("float32")
                for step in T.serial(whole):
                    y[row, lanes(step * LANES)] = (
                        function(gate_up[row, lanes(step * LANES)]) * gate_up[row, lanes(columns + step * LANES)]
                    )
                if rest > 0:
                    edge[lanes(0)] = splat(0.0)
                    for i in T.serial(rest):
                        edge[i] = gate_up[row, whole * LANES + i]
                    edge[lanes(0)] = function(edge[lanes(0)])
                    for i in T.serial(rest):
                        y[row, whole * LANES + i] = edge[i] * gate_up[row, columns + whole * LANES + i]

    return kernel


def gated_quantise(rows: int, columns: int, function: Function, planes: int) -> tirx.PrimFunc:
    """Build `gated` whose rows are only quantised.

    ``(gate_up f32 [M, 2F]) -> planes i8 [P * M, Fp], row_scale f32 [M], plane_offset i32 [P * M]``, the bits of
    `quantise.quantise_rows` on its rows.
    """
    whole, rest = divmod(columns, LANES)
    padded = round_up(columns, PLANE_MULTIPLE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        gate_up: T.Buffer((rows, 2 * columns), "float32"),
        planes_: T.Buffer((planes * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((planes * rows,), "int32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _EXP_VALUES_PER_US):
                values = padded_row(columns)
                for step in T.serial(whole):
                    values[lanes(step * LANES)] = (
                        function(gate_up[row, lanes(step * LANES)]) * gate_up[row, lanes(columns + step * LANES)]
                    )
                if rest > 0:
                    for i in T.serial(rest):
                        values[whole * LANES + i] = gate_up[row, whole * LANES + i]
                    values[lanes(whole * LANES)] = function(values[lanes(whole * LANES)])
                    for i in T.serial(rest):
                        values[whole * LANES + i] = (
                            values[whole * LANES + i] * gate_up[row, columns + whole * LANES + i]
                        )
                QuantisedRows(planes_, row_scale, plane_offset).store(row, values)

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
