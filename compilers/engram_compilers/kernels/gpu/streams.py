# mypy: disable-error-code="valid-type, untyped-decorator"
"""Kernels on several residual streams side by side, ``[T, G * D]``: mixing, injecting, the gate of an n-gram memory."""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.activation import sigmoid
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, added, fma, own_columns
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.streams import GATE_FLOOR


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
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows):
                for thread in blocks.threads():
                    _pre_mix(x, mix, y, row, thread, scale)

    return kernel


def _pre_mix(x: Expr, mix: Expr, y: Expr, row: Expr, thread: Expr, scale: float) -> None:
    columns = int(y.shape[1])
    with own_columns(columns, thread) as (_, column):
        total = blocks.local(1, "float32")
        T.buffer_store(total, T.float32(0.0), [0])
        with T.serial(int(x.shape[1]) // columns) as stream:
            place = T.Bind(stream * columns + column)
            T.buffer_store(total, fma(x[row, place], mix[row, place], total[0]), [0])
        T.buffer_store(y, total[0] * T.float32(scale), [row, column])


def post_mix(rows: int, streams: int, columns: int) -> tirx.PrimFunc:
    """Build ``(x f32 [M, G*D], out f32 [M, D], inject f32 [M, G]) -> y f32 [M, G*D]``, y = x + inject * out."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, streams * columns), "float32"),
        out: T.Buffer((rows, columns), "float32"),
        inject: T.Buffer((rows, streams), "float32"),
        y: T.Buffer((rows, streams * columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows, "y"):
                for stream in blocks.blocks(streams):
                    for thread in blocks.threads():
                        _post_mix(x, out, inject, y, row, stream, thread)

    return kernel


def _post_mix(x: Expr, out: Expr, inject: Expr, y: Expr, row: Expr, stream: Expr, thread: Expr) -> None:
    columns = int(out.shape[1])
    with own_columns(columns, thread) as (_, column):
        place = T.Bind(stream * columns + column)
        T.buffer_store(y, fma(inject[row, stream], out[row, column], x[row, place]), [row, place])


def gate_value(rows: int, streams: int, columns: int) -> tirx.PrimFunc:
    """Build ``(key f32 [M, G*D], query f32 [M, G*D], value f32 [M, D]) -> y f32 [M, G*D]``, key and query normed.

    Per stream: s = <key, query> / sqrt(D), y = sigmoid(sign(s) * sqrt(max(|s|, GATE_FLOOR))) * value, by the order of
    `blocks`.
    """

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        key: T.Buffer((rows, streams * columns), "float32"),
        query: T.Buffer((rows, streams * columns), "float32"),
        value: T.Buffer((rows, columns), "float32"),
        y: T.Buffer((rows, streams * columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for row in blocks.blocks(rows, "y"):
                for stream in blocks.blocks(streams):
                    for thread in blocks.threads():
                        _gate_value(key, query, value, y, row, stream * columns, thread)

    return kernel


def _gate_value(key: Expr, query: Expr, value: Expr, y: Expr, row: Expr, first: Expr, thread: Expr) -> None:
    columns = int(value.shape[1])
    products = blocks.local(1, "float32")
    T.buffer_store(products, T.float32(0.0), [0])
    with own_columns(columns, thread) as (_, column):
        T.buffer_store(products, fma(key[row, first + column], query[row, first + column], products[0]), [0])
    score = T.Bind(added(products[0], thread) * T.float32(columns**-0.5))
    root = T.Bind(T.sqrt(T.max(T.fabs(score), T.float32(GATE_FLOOR))))
    zero = T.float32(0.0)
    gate = T.Bind(sigmoid(T.Select(score > zero, root, T.Select(score < zero, zero - root, score))))
    with own_columns(columns, thread) as (_, column):
        T.buffer_store(y, gate * value[row, column], [row, first + column])
