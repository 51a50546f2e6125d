# mypy: disable-error-code="valid-type, untyped-decorator"
"""What is left of a quantised linear layer once an accelerator has made its integer sums: join planes, scale."""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.experts import Routing
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import loop_over
from engram_compilers.kernels.quantise import MOST_PLANES, joined

_VALUES_PER_US = 2000.0


def scale_sums(rows: int, out_features: int, planes: int) -> tirx.PrimFunc:
    """Build ``(sums i32 [P*M, N], row_scale f32 [M], channel_scale f32 [N]) -> y f32 [M, N]``.

    y[m, n] = (joined sums * channel_scale[n]) * row_scale[m], as `portable.linear_int8` has it.
    """
    count = planes

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        sums: T.Buffer((count * rows, out_features), "int32"),
        row_scale: T.Buffer((rows,), "float32"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * out_features / _VALUES_PER_US):
                for output in T.serial(out_features):
                    total: T.let = joined(_planes(sums, count, rows, row, output))
                    y[row, output] = total * channel_scale[output] * row_scale[row]

    return kernel


def scale_expert_sums(routing: Routing, rows: int, out_features: int) -> tirx.PrimFunc:
    """Build the same for the layer of chosen experts, as `portable_experts.expert_linear_int8` has it.

    ``(sums i32 [2P, N], row_scale f32 [M], order, expert, start, count, scale f32 [E * N]) -> y f32 [P, N]``; the sums
    are in the order of the pairs. order .. count: `experts.Segments`.
    """
    per_row = routing.pairs // rows

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        sums: T.Buffer((MOST_PLANES * routing.pairs, out_features), "int32"),
        row_scale: T.Buffer((rows,), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        scale: T.Buffer((routing.experts * out_features,), "float32"),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for segment in T.serial(count[0]):
                first: T.let = T.cast(expert[segment], "int64") * out_features
                for place in T.serial(start[segment], start[segment + 1]):
                    pair: T.let = order[place]
                    for output in T.serial(out_features):
                        total: T.let = joined(_planes(sums, MOST_PLANES, routing.pairs, pair, output))
                        y[pair, output] = total * scale[first + output] * row_scale[pair // per_row]

    return kernel


def _planes(sums: Expr, planes: int, rows: int, row: Expr, output: Expr) -> list[Expr]:
    """Return the sums of each plane of a row."""
    return [sums[plane * rows + row, output] for plane in range(planes)]
