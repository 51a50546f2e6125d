# mypy: disable-error-code="valid-type, untyped-decorator"
"""Quantise activation rows to 8 bits or two planes of them: the bits of `engram_compilers.kernels.quantise`.

There are no plane offsets: the weights of these kernels have no bias.
"""

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, combined, own_columns, own_values, rounded
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import round_up
from engram_compilers.kernels.quantise import LARGEST, PLANE_MULTIPLE, SMALLEST_PEAK

_SMALLEST_PEAK_BITS = int(SMALLEST_PEAK.view("int32"))
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedRows:
    """What a kernel that quantises M rows of K writes, as buffers.

    Attributes:
        planes: i8 ``[P * M, Kp]`` as `engram_compilers.kernels.quantise.QuantisedRows.planes`.
        row_scale: f32 ``[M]``.
    """

    planes: Expr
    row_scale: Expr

    def store(self, row: Expr, thread: Expr, values: Expr, columns: int) -> None:
        """Emit the quantisation of a row, whose values the threads have as `blocks.own_values`."""
        rows = int(self.row_scale.shape[0])
        count = int(self.planes.shape[0]) // rows
        largest = float(LARGEST[count])
        peak = T.Bind(_peak(values, columns, thread))
        factor = T.Bind(T.float32(largest) / peak)
        with T.If(thread == 0), T.Then():
            T.buffer_store(self.row_scale, peak / T.float32(largest), [row])
        with own_columns(columns, thread) as (step, column):
            scaled = T.min(T.max(rounded(values[step] * factor), T.float32(-largest)), T.float32(largest))
            value = T.Bind(T.cast(scaled, "int32"))
            high = T.Bind(T.shift_right(value + 128, 8))
            parts = [value] if count == 1 else [high, value - high * 256]
            for plane, part in enumerate(parts):
                T.buffer_store(self.planes, T.cast(part, "int8"), [plane * rows + row, column])
        if padding := int(self.planes.shape[1]) - columns:
            with T.If(thread < padding), T.Then():
                for plane in range(count):
                    T.buffer_store(self.planes, T.int8(0), [plane * rows + row, columns + thread])


def _peak(values: Expr, columns: int, thread: Expr) -> Expr:
    """Return max|x| of a row, by bits: they order like the values, and a NaN is larger than all."""
    peak = blocks.local(1, "int32")
    T.buffer_store(peak, T.int32(_SMALLEST_PEAK_BITS), [0])
    with own_columns(columns, thread) as (step, _):
        magnitude = T.bitwise_and(T.reinterpret("int32", values[step]), T.int32(_MAGNITUDE))
        T.buffer_store(peak, T.max(peak[0], magnitude), [0])
    return T.reinterpret("float32", combined(peak[0], thread, T.max))


def quantised_types(rows: int, columns: int, planes: int) -> list[tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes of `QuantisedRows`, in the order kernels take them."""
    padded = round_up(columns, PLANE_MULTIPLE)
    return [((planes * rows, padded), "int8"), ((rows,), "float32")]


def quantise_rows(rows: int, columns: int, planes: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, K]) -> planes i8 [P * M, Kp], row_scale f32 [M]``, a block of threads a row."""
    padded = round_up(columns, PLANE_MULTIPLE)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, columns), "float32"),
        planes_: T.Buffer((planes * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _quantise(x, QuantisedRows(planes_, row_scale), row, thread)

    return kernel


def _quantise(x: Expr, quantised: QuantisedRows, row: Expr, thread: Expr) -> None:
    columns = int(x.shape[1])
    quantised.store(row, thread, own_values(columns, thread, lambda column: x[row, column]), columns)
