# mypy: disable-error-code="valid-type, untyped-decorator"
"""Root mean square normalisation of rows, alone or with what comes before and after it, and norms of rows.

Order: lane i sums columns i, i+16, i+32, ... ascending by fma, then the tree of `lane_sum`; the mean and eps are joined
by one fma, sum * (1/D) + eps. A normed value is x * (1 / sqrt(mean(x^2) + eps)) * gain.
"""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, fma, lane_sum, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, each_vector, loop_over, round_up
from engram_compilers.kernels.quantise import PLANE_MULTIPLE, QuantisedRows, padded_row, row_of

_VALUES_PER_US = 8000.0
_QUANTISED_PER_US = 3000.0


def rms_norm(rows: int, columns: int, eps: float, branches: int = 1) -> tirx.PrimFunc:
    """Build ``(x f32 [M, D], gain f32 [G * D]) -> y f32 [M, D]``; row r has the gains of branch r % G."""
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
                squares = new_lanes("float32")
                squares[lanes(0)] = splat(0.0)
                for step in T.serial(whole):
                    value: T.let = x[row, lanes(step * LANES)]
                    squares[lanes(0)] = fma(value, value, squares[lanes(0)])
                for i in T.unroll(rest):
                    edge: T.let = x[row, whole * LANES + i]
                    squares[i] = fma(edge, edge, squares[i])
                factor: T.let = _inverse_root(squares, columns, eps)
                for step in T.serial(whole):
                    y[row, lanes(step * LANES)] = (
                        x[row, lanes(step * LANES)] * splat(factor) * gain[lanes(first + step * LANES)]
                    )
                for i in T.unroll(rest):
                    y[row, whole * LANES + i] = x[row, whole * LANES + i] * factor * gain[first + whole * LANES + i]

    return kernel


def l2_norm(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, D]) -> y f32 [M]``, y = sqrt(sum of x^2 over a row)."""
    whole, rest = divmod(columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((rows, columns), "float32"), y: T.Buffer((rows,), "float32")) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _VALUES_PER_US):
                squares = new_lanes("float32")
                squares[lanes(0)] = splat(0.0)
                for step in T.serial(whole):
                    value: T.let = x[row, lanes(step * LANES)]
                    squares[lanes(0)] = fma(value, value, squares[lanes(0)])
                for i in T.unroll(rest):
                    edge: T.let = x[row, whole * LANES + i]
                    squares[i] = fma(edge, edge, squares[i])
                y[row] = T.sqrt(lane_sum(squares[lanes(0)]))

    return kernel


def _inverse_root(squares: Expr, columns: int, eps: float) -> Expr:
    mean = fma(lane_sum(squares[lanes(0)]), T.float32(1.0 / columns), T.float32(eps))
    return T.float32(1.0) / T.sqrt(mean)


def norm_quantise(rows: int, columns: int, eps: float, planes: int) -> tirx.PrimFunc:
    """Build `rms_norm` whose rows are only quantised.

    ``(x f32 [M, D], gain f32 [D]) -> planes i8 [P * M, Dp], row_scale f32 [M], plane_offset i32 [P * M]``, the bits of
    `quantise.quantise_rows` on the normed rows.
    """
    padded = round_up(columns, PLANE_MULTIPLE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, columns), "float32"),
        gain: T.Buffer((columns,), "float32"),
        planes_: T.Buffer((planes * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((planes * rows,), "int32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _QUANTISED_PER_US):
                values = row_of(x, row)
                _normalise(values, gain, eps)
                QuantisedRows(planes_, row_scale, plane_offset).store(row, values)

    return kernel


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
        plane_offset: T.Buffer((planes * rows,), "int32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * columns / _QUANTISED_PER_US):
                values = _sum_of(a, b, total, row)
                _normalise(values, gain, eps)
                QuantisedRows(planes_, row_scale, plane_offset).store(row, values)

    return kernel


def _sum_of(a: Expr, b: Expr, total: Expr, row: Expr) -> Expr:
    """Return a row of a + b, which is also written to ``total``."""
    columns = int(a.shape[1])
    values = padded_row(columns)
    each_vector(columns, lambda index, _: T.buffer_store(values, a[row, index] + b[row, index], [index]))
    each_vector(columns, lambda index, _: T.buffer_store(total, values[index], [row, index]))
    return values


def _normalise(values: Expr, gain: Expr, eps: float) -> None:
    """Normalise a row of `quantise.padded_row`; its zeros at the end change no sum."""
    columns = int(gain.shape[0])
    squares = new_lanes("float32")
    T.buffer_store(squares, splat(0.0), [lanes(0)])
    with T.serial(round_up(columns, LANES) // LANES) as step:
        value = values[lanes(step * LANES)]
        T.buffer_store(squares, fma(value, value, squares[lanes(0)]), [lanes(0)])
    factor = T.Bind(_inverse_root(squares, columns, eps))
    each_vector(
        columns,
        lambda index, repeat: T.buffer_store(values, values[index] * repeat(factor) * gain[index], [index]),
    )
