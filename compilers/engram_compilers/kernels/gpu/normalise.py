# mypy: disable-error-code="valid-type, untyped-decorator"
"""Root mean square normalisation of rows, alone or with what comes before and after it, and norms of rows.

Order: that of `blocks`, squares by fma; the mean and eps are joined by one fma, sum * (1/D) + eps. A normed value is
x * (1 / sqrt(mean(x^2) + eps)) * gain.
"""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, added, fma, own_columns, own_values
from engram_compilers.kernels.gpu.quantise import QuantisedRows
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import round_up
from engram_compilers.kernels.quantise import PLANE_MULTIPLE


def rms_norm(rows: int, columns: int, eps: float, branches: int = 1) -> tirx.PrimFunc:
    """Build ``(x f32 [M, D], gain f32 [G * D]) -> y f32 [M, D]``; row r has the gains of branch r % G."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, columns), "float32"),
        gain: T.Buffer((branches * columns,), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _store_normed(x, gain, y, row, thread, eps, branches)

    return kernel


def _store_normed(x: Expr, gain: Expr, y: Expr, row: Expr, thread: Expr, eps: float, branches: int) -> None:
    columns = int(x.shape[1])
    first = T.Bind(T.floormod(row, branches) * columns)
    values = own_values(columns, thread, lambda column: x[row, column])
    _normalise(values, gain, first, columns, thread, eps)
    with own_columns(columns, thread) as (step, column):
        T.buffer_store(y, values[step], [row, column])


def l2_norm(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, D]) -> y f32 [M]``, y = sqrt(sum of x^2 over a row)."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((rows, columns), "float32"), y: T.Buffer((rows,), "float32")) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _store_root(x, y, row, thread)

    return kernel


def _store_root(x: Expr, y: Expr, row: Expr, thread: Expr) -> None:
    columns = int(x.shape[1])
    values = own_values(columns, thread, lambda column: x[row, column])
    total = T.Bind(_sum_of_squares(values, columns, thread))
    with T.If(thread == 0), T.Then():
        T.buffer_store(y, T.sqrt(total), [row])


def norm_quantise(rows: int, columns: int, eps: float, planes: int) -> tirx.PrimFunc:
    """Build `rms_norm` whose rows are only quantised.

    ``(x f32 [M, D], gain f32 [D]) -> planes i8 [P * M, Dp], row_scale f32 [M]``, the bits of
    `quantise.quantise_rows` on the normed rows.
    """
    padded = round_up(columns, PLANE_MULTIPLE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, columns), "float32"),
        gain: T.Buffer((columns,), "float32"),
        planes_: T.Buffer((planes * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _quantise_normed(x, gain, QuantisedRows(planes_, row_scale), row, thread, eps)

    return kernel


def _quantise_normed(x: Expr, gain: Expr, quantised: QuantisedRows, row: Expr, thread: Expr, eps: float) -> None:
    columns = int(x.shape[1])
    values = own_values(columns, thread, lambda column: x[row, column])
    _normalise(values, gain, 0, columns, thread, eps)
    quantised.store(row, thread, values, columns)


def add_norm_quantise(rows: int, columns: int, eps: float, planes: int) -> tirx.PrimFunc:
    """Build `norm_quantise` of a sum, which is the first result.

    ``(a f32 [M, D], b f32 [M, D], gain f32 [D]) -> total f32 [M, D]``, then the results of `norm_quantise`.
    """
    padded = round_up(columns, PLANE_MULTIPLE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        a: T.Buffer((rows, columns), "float32"),
        b: T.Buffer((rows, columns), "float32"),
        gain: T.Buffer((columns,), "float32"),
        total: T.Buffer((rows, columns), "float32"),
        planes_: T.Buffer((planes * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _quantise_sum(a, b, gain, total, QuantisedRows(planes_, row_scale), row, thread, eps)

    return kernel


def _quantise_sum(
    a: Expr, b: Expr, gain: Expr, total: Expr, quantised: QuantisedRows, row: Expr, thread: Expr, eps: float
) -> None:
    columns = int(a.shape[1])
    values = own_values(columns, thread, lambda column: a[row, column] + b[row, column])
    with own_columns(columns, thread) as (step, column):
        T.buffer_store(total, values[step], [row, column])
    _normalise(values, gain, 0, columns, thread, eps)
    quantised.store(row, thread, values, columns)


def _normalise(values: Expr, gain: Expr, first: Expr, columns: int, thread: Expr, eps: float) -> None:
    """Normalise a row the threads have, by the gains from ``first`` on."""
    mean = fma(_sum_of_squares(values, columns, thread), T.float32(1.0 / columns), T.float32(eps))
    factor = T.Bind(T.float32(1.0) / T.sqrt(mean))
    with own_columns(columns, thread) as (step, column):
        T.buffer_store(values, values[step] * factor * gain[first + column], [step])


def _sum_of_squares(values: Expr, columns: int, thread: Expr) -> Expr:
    squares = blocks.local(1, "float32")
    T.buffer_store(squares, T.float32(0.0), [0])
    with own_columns(columns, thread) as (step, _):
        T.buffer_store(squares, fma(values[step], values[step], squares[0]), [0])
    return added(squares[0], thread)
