# mypy: disable-error-code="valid-type, untyped-decorator"
"""Rotary position embedding, as in `engram_compilers.kernels.rotary`: a thread a pair of dimensions."""

from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, fma, own_columns
from engram_compilers.kernels.intrinsics import Expr, converted

HEAD_THREADS = 32  # of a block that shares a head


def rotate(
    target: Expr,
    target_place: Sequence[Expr],
    source: Expr,
    source_place: Sequence[Expr],
    cos: Expr,
    sin: Expr,
    position: Expr,
    head_dim: int,
    thread: Expr,
) -> None:
    """Write a head of ``source``, rotated, to ``target``; places are those of its first dimension.

    The halves (x1, x2) of the first rotary_dim dimensions become fma(x1, cos, -(x2 * sin)) and fma(x2, cos, x1 * sin);
    the dimensions after them are copied. A target of another dtype gets them rounded once.
    """
    half = int(cos.shape[1])

    def load(dimension: Expr) -> Expr:
        return source[(*source_place[:-1], source_place[-1] + dimension)]

    def store(dimension: Expr, value: Expr) -> None:
        T.buffer_store(target, converted(value, target.dtype, 1), [*target_place[:-1], target_place[-1] + dimension])

    with own_columns(half, thread, HEAD_THREADS) as (_, dimension):
        x1, x2 = T.Bind(load(dimension)), T.Bind(load(half + dimension))
        c, s = T.Bind(cos[position, dimension]), T.Bind(sin[position, dimension])
        store(dimension, fma(x1, c, T.float32(0.0) - x2 * s))
        store(half + dimension, fma(x2, c, x1 * s))
    if head_dim > 2 * half:
        with own_columns(head_dim - 2 * half, thread, HEAD_THREADS) as (_, rest):
            store(2 * half + rest, load(2 * half + rest))


def rotate_queries(tokens: int, heads: int, head_dim: int, rotary_dim: int, capacity: int) -> tirx.PrimFunc:
    """Build ``(query f32 [T, H * hd], cos f32 [S, rotary_dim/2], sin, position i64 [1]) -> q f32 [T, H * hd]``.

    Token t is rotated to position + t.
    """
    half = rotary_dim // 2

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        query: T.Buffer((tokens, heads * head_dim), "float32"),
        cos: T.Buffer((capacity, half), "float32"),
        sin: T.Buffer((capacity, half), "float32"),
        position: T.Buffer((1,), "int64"),
        q: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(tokens, "y"):
                for head in blocks.blocks(heads):
                    for thread in blocks.threads(HEAD_THREADS):
                        _rotate_query(query, cos, sin, position, q, token, head * head_dim, head_dim, thread)

    return kernel


def _rotate_query(
    query: Expr, cos: Expr, sin: Expr, position: Expr, q: Expr, token: Expr, first: Expr, head_dim: int, thread: Expr
) -> None:
    row = T.Bind(T.cast(position[0], "int32") + token)
    rotate(q, [token, first], query, [token, first], cos, sin, row, head_dim, thread)
