# mypy: disable-error-code="valid-type, untyped-decorator"
"""Which experts a call needs, and the mixture of what they make: one block of threads chooses for all tokens.

Pairs, segments and the results of `route` are those of `engram_compilers.kernels.experts`. A thread chooses for a
token, and the first thread of the block sorts the pairs.
"""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.experts import Routing, Segments, order_by_expert
from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, fma, own_columns
from engram_compilers.kernels.intrinsics import Expr

_LOWEST_KEY = -(2**31)  # below the key of any value, for experts already chosen
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


def route(routing: Routing, *, normalise: bool) -> tirx.PrimFunc:
    """Build the kernel that chooses experts and orders the pairs by them.

    Arguments and results are those of `engram_compilers.kernels.experts.route`; sums run over slots, or all experts,
    ascending.
    """
    tokens, experts, top_k = routing.tokens, routing.experts, routing.top_k

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        logits: T.Buffer((tokens, experts), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((tokens, top_k), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for _ in blocks.blocks(1):
                for thread in blocks.threads():
                    _route(routing, logits, Segments(order, expert, start, count), weight, thread, normalise)

    return kernel


def _route(routing: Routing, logits: Expr, segments: Segments, weight: Expr, thread: Expr, normalise: bool) -> None:
    chosen = blocks.shared((routing.pairs,), "int32")
    with own_columns(routing.tokens, thread) as (_, token):
        keys = blocks.local(routing.experts, "int32")
        with T.serial(routing.experts) as e:
            T.buffer_store(keys, _key(logits[token, e]), [e])
        with T.serial(routing.top_k) as slot:
            best = T.Bind(_first_of_largest(keys, routing.experts))
            T.buffer_store(chosen, best, [token * routing.top_k + slot])
            T.buffer_store(weight, logits[token, best], [token, slot])
            T.buffer_store(keys, T.int32(_LOWEST_KEY), [best])
        _weigh(routing, logits, weight, token, normalise)
    blocks.synchronise()
    with T.If(thread == 0), T.Then():
        place, found = blocks.local(routing.experts, "int32"), blocks.local(2, "int32")
        order_by_expert(routing, chosen, segments, place, found)


def _key(logit: Expr) -> Expr:
    """Return an integer that orders as the logit does; that of a NaN is the largest, to be seen."""
    bits = T.Bind(T.reinterpret("int32", logit))
    magnitude = T.Bind(T.bitwise_and(bits, T.int32(_MAGNITUDE)))
    key = T.Select(bits < 0, T.int32(0) - magnitude, magnitude)
    return T.Select(magnitude > T.int32(_INFINITY), T.int32(_MAGNITUDE), key)


def _first_of_largest(keys: Expr, count: int) -> Expr:
    """Return the lowest index of the largest key."""
    best = blocks.local(1, "int32")
    T.buffer_store(best, T.int32(0), [0])
    with T.serial(count) as e, T.If(keys[e] > keys[best[0]]), T.Then():
        T.buffer_store(best, e, [0])
    return best[0]


def _weigh(routing: Routing, logits: Expr, weight: Expr, token: Expr, normalise: bool) -> None:
    """Turn a token's chosen logits, the largest first, into their shares of the softmax over them, or over all."""
    largest = T.Bind(weight[token, 0])
    total = blocks.local(1, "float32")
    T.buffer_store(total, T.float32(0.0), [0])
    if not normalise:
        with T.serial(routing.experts) as e:
            T.buffer_store(total, total[0] + T.exp(logits[token, e] - largest), [0])
    with T.serial(routing.top_k) as slot:
        decay = T.Bind(T.exp(weight[token, slot] - largest))
        T.buffer_store(weight, decay, [token, slot])
        if normalise:
            T.buffer_store(total, total[0] + decay, [0])
    with T.serial(routing.top_k) as slot:
        T.buffer_store(weight, weight[token, slot] / total[0], [token, slot])


def combine(routing: Routing, columns: int) -> tirx.PrimFunc:
    """Build ``(y f32 [P, D], weight f32 [T, k]) -> out f32 [T, D]``, out[t] = sum_j weight[t, j] * y[t * k + j].

    Slots ascending, by fma from 0.
    """

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        y: T.Buffer((routing.pairs, columns), "float32"),
        weight: T.Buffer((routing.tokens, routing.top_k), "float32"),
        out: T.Buffer((routing.tokens, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(routing.tokens):
                for thread in blocks.threads():
                    _combine(y, weight, out, token, thread)

    return kernel


def _combine(y: Expr, weight: Expr, out: Expr, token: Expr, thread: Expr) -> None:
    top_k = int(weight.shape[1])
    with own_columns(int(out.shape[1]), thread) as (_, column):
        total = blocks.local(1, "float32")
        T.buffer_store(total, T.float32(0.0), [0])
        with T.serial(top_k) as slot:
            T.buffer_store(total, fma(weight[token, slot], y[token * top_k + slot, column], total[0]), [0])
        T.buffer_store(out, total[0], [token, column])
