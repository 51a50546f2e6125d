# mypy: disable-error-code="valid-type, untyped-decorator"
"""Rotary position embedding: the first dimensions of a head turn, the halves of them as real and imaginary part."""

from collections.abc import Iterator, Sequence

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, converted, fma, lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over

ROTATED_PER_US = 9000.0


def spans(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a range of columns into (start, width): vectors of 16, then of 8, then single ones."""
    for width in (LANES, LANES // 2, 1):
        while end - begin >= width:
            yield begin, width
            begin += width


def span(start: Expr, width: int) -> Expr:
    """Index ``width`` neighbouring elements, a vector unless there is only one."""
    return start if width == 1 else lanes(start, width)


def rotate(
    target: Expr,
    target_row: Sequence[Expr],
    target_column: Expr,
    source: Expr,
    source_row: Sequence[Expr],
    source_column: Expr,
    cos: Expr,
    sin: Expr,
    position: Expr,
    head_dim: int,
) -> None:
    """Write the head at source[*source_row, source_column:] to target[*target_row, target_column:], rotated.

    ``cos`` and ``sin`` are ``[S, rotary_dim / 2]``. The halves (x1, x2) of the first rotary_dim dimensions become
    fma(x1, cos, -(x2 * sin)) and fma(x2, cos, x1 * sin); the dimensions after them are copied. A target of another
    dtype gets them rounded once.
    """
    half = int(cos.shape[1])

    def load(start: int, width: int) -> Expr:
        return source[(*source_row, span(source_column + start, width))]

    def store(start: int, width: int, value: Expr) -> None:
        place = [*target_row, span(target_column + start, width)]
        T.buffer_store(target, converted(value, target.dtype, width), place)

    for start, width in spans(0, half):
        x1, x2 = T.Bind(load(start, width)), T.Bind(load(half + start, width))
        c, s = T.Bind(cos[position, span(start, width)]), T.Bind(sin[position, span(start, width)])
        minus_one = T.float32(-1.0) if width == 1 else splat(-1.0, width)
        store(start, width, fma(x1, c, minus_one * (x2 * s)))
        store(half + start, width, fma(x2, c, x1 * s))
    for start, width in spans(2 * half, head_dim):
        store(start, width, load(start, width))


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
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * heads * head_dim / ROTATED_PER_US):
                row: T.let = T.cast(position[0], "int32") + token
                for head in T.serial(heads):
                    rotate(q, [token], head * head_dim, query, [token], head * head_dim, cos, sin, row, head_dim)

    return kernel
