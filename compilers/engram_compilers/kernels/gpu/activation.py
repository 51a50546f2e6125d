# mypy: disable-error-code="valid-type, untyped-decorator"
"""Element-wise kernels between the linear layers; exp and tanh are those of the language."""

from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, THREADS, fma, own_columns, own_values, steps
from engram_compilers.kernels.gpu.quantise import QuantisedRows
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import round_up
from engram_compilers.kernels.quantise import PLANE_MULTIPLE

_TWICE_SQRT_2_OVER_PI = 1.5957691216057308
_GELU_CUBE = 0.044715

Function = Callable[[Expr], Expr]  # of float32


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + exp(-x)); exp of a very negative x is infinite, and the quotient 0."""
    return T.float32(1.0) / (T.float32(1.0) + T.exp(T.float32(0.0) - x))


def silu(gate: Expr) -> Expr:
    """Return gate * sigmoid(gate)."""
    x = T.Bind(gate)
    return x * sigmoid(x)


def gelu(gate: Expr) -> Expr:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which is x * sigmoid of twice that argument."""
    x = T.Bind(gate)
    slope = fma(x * x, T.float32(_TWICE_SQRT_2_OVER_PI * _GELU_CUBE), T.float32(_TWICE_SQRT_2_OVER_PI))
    return x * sigmoid(T.Bind(x * slope))


def tanh(x: Expr) -> Expr:
    """Return tanh(x)."""
    return T.tanh(x)


GATES: Mapping[str, Function] = {"silu": silu, "gelu": gelu}


def each(size: int, function: Function) -> tirx.PrimFunc:
    """Build ``(x f32 [N]) -> y f32 [N]``, y = function(x)."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((size,), "float32"), y: T.Buffer((size,), "float32")) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for block in blocks.blocks(steps(size)):
                for thread in blocks.threads():
                    if block * THREADS + thread < size:
                        y[block * THREADS + thread] = function(x[block * THREADS + thread])

    return kernel


def gated(rows: int, columns: int, function: Function) -> tirx.PrimFunc:
    """Build ``(gate_up f32 [M, 2F]) -> y f32 [M, F]``, y = function(gate) * up; the gate is the first half of a row."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        gate_up: T.Buffer((rows, 2 * columns), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _store_gated(gate_up, y, row, thread, function)

    return kernel


def _store_gated(gate_up: Expr, y: Expr, row: Expr, thread: Expr, function: Function) -> None:
    columns = int(y.shape[1])
    with own_columns(columns, thread) as (_, column):
        T.buffer_store(y, function(gate_up[row, column]) * gate_up[row, columns + column], [row, column])


def gated_quantise(rows: int, columns: int, function: Function, planes: int) -> tirx.PrimFunc:
    """Build `gated` whose rows are only quantised.

    ``(gate_up f32 [M, 2F]) -> planes i8 [P * M, Fp], row_scale f32 [M]``, the bits of `quantise.quantise_rows` on its
    rows.
    """
    padded = round_up(columns, PLANE_MULTIPLE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        gate_up: T.Buffer((rows, 2 * columns), "float32"),
        planes_: T.Buffer((planes * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _quantise_gated(gate_up, QuantisedRows(planes_, row_scale), row, thread, function)

    return kernel


def _quantise_gated(gate_up: Expr, quantised: QuantisedRows, row: Expr, thread: Expr, function: Function) -> None:
    columns = int(gate_up.shape[1]) // 2
    values = own_values(columns, thread, lambda column: function(gate_up[row, column]) * gate_up[row, columns + column])
    quantised.store(row, thread, values, columns)


def add(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``(a f32 [M, D], b f32 [M, D]) -> y f32 [M, D]``, y = a + b."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        a: T.Buffer((rows, columns), "float32"),
        b: T.Buffer((rows, columns), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _store_sum(a, b, y, row, thread)

    return kernel


def _store_sum(a: Expr, b: Expr, y: Expr, row: Expr, thread: Expr) -> None:
    with own_columns(int(y.shape[1]), thread) as (_, column):
        T.buffer_store(y, a[row, column] + b[row, column], [row, column])
