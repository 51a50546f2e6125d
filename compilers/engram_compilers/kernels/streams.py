# mypy: disable-error-code="valid-type, untyped-decorator"
"""Kernels on several residual streams side by side, ``[T, G * D]``: mixing, injecting, the gate of an n-gram memory."""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.activation import sigmoid
from engram_compilers.kernels.intrinsics import fma, lane_sum, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over

GATE_FLOOR = 1e-6  # least magnitude of the score under the signed root
_VALUES_PER_US = 4000.0


def pre_mix(rows: int, streams: int, columns: int, scale: float) -> tirx.PrimFunc:
    """Build ``(x f32 [M, G*D], mix f32 [M, G*D]) -> y f32 [M, D]``, y = scale * sum over streams of x * mix.

    Order: streams ascending by fma, then the scale.
    """

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, streams * columns), "float32"),
        mix: T.Buffer((rows, streams * columns), "float32"),
        y: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * streams * columns / _VALUES_PER_US):
                for column in T.serial(columns):
                    total = T.alloc_buffer((1,), "float32")
                    total[0] = T.float32(0.0)
                    for stream in T.serial(streams):
                        total[0] = fma(x[row, stream * columns + column], mix[row, stream * columns + column], total[0])
                    y[row, column] = total[0] * T.float32(scale)

    return kernel


def post_mix(rows: int, streams: int, columns: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, G*D], out f32 [M, D], inject f32 [M, G]) -> y f32 [M, G*D]``, y = x + inject * out."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, streams * columns), "float32"),
        out: T.Buffer((rows, columns), "float32"),
        inject: T.Buffer((rows, streams), "float32"),
        y: T.Buffer((rows, streams * columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in loop_over(rows, rows * streams * columns / _VALUES_PER_US):
                for stream in T.serial(streams):
                    for column in T.serial(columns):
                        y[row, stream * columns + column] = fma(
                            inject[row, stream], out[row, column], x[row, stream * columns + column]
                        )

    return kernel


def gate_value(rows: int, streams: int, columns: int) -> tirx.PrimFunc:
    """Build ``(key f32 [M, G*D], query f32 [M, G*D], value f32 [M, D]) -> y f32 [M, G*D]``, key and query normed.

    Per stream: s = <key, query> / sqrt(D), y = sigmoid(sign(s) * sqrt(max(|s|, GATE_FLOOR))) * value.
    Order: lane i sums columns i, i+16, ... ascending by fma, then the tree of `lane_sum`.
    """
    whole, rest = divmod(columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        key: T.Buffer((rows, streams * columns), "float32"),
        query: T.Buffer((rows, streams * columns), "float32"),
        value: T.Buffer((rows, columns), "float32"),
        y: T.Buffer((rows, streams * columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for pair in loop_over(rows * streams, rows * streams * columns / _VALUES_PER_US):
                row: T.let = T.floordiv(pair, streams)
                first: T.let = T.floormod(pair, streams) * columns
                sums = new_lanes("float32")
                gate = new_lanes("float32")
                sums[lanes(0)] = splat(0.0)
                for step in T.serial(whole):
                    at: T.let = first + step * LANES
                    sums[lanes(0)] = fma(key[row, lanes(at)], query[row, lanes(at)], sums[lanes(0)])
                for i in T.unroll(rest):
                    edge: T.let = first + whole * LANES + i
                    sums[i] = fma(key[row, edge], query[row, edge], sums[i])
                score: T.let = lane_sum(sums[lanes(0)]) * T.float32(columns**-0.5)
                root: T.let = T.sqrt(T.max(T.fabs(score), T.float32(GATE_FLOOR)))
                signed: T.let = T.Select(score > 0.0, root, T.Select(score < 0.0, -root, score))  # a nan stays one
                gate[lanes(0)] = sigmoid(splat(signed))
                for column in T.serial(columns):
                    y[row, first + column] = gate[0] * value[row, column]

    return kernel
