# mypy: disable-error-code="valid-type, untyped-decorator"
"""Routed mixtures of experts: which experts a call needs, linear layers that read only those, and the mixture.

A *pair* is a token and one of its experts: pair ``t * k + j`` is slot j of token t. `route` orders the pairs by
expert; a *segment* is a run of pairs with the same expert. Linear layers go over the segments, so a tile of an
expert's weight is read from memory once for all its tokens, and nothing of an expert that no token chose.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.float_linear import FLOAT32, widened
from engram_compilers.kernels.intrinsics import Expr, exp16, fma, lane_fold, lane_max, lane_sum, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_runtime.errors import CompileError

_LOWEST_KEY = -(2**31)  # below the key of any value, for experts already chosen and lanes past the last one
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000
_KEYS_PER_US = 4000.0
_MIXED_VALUES_PER_US = 4000.0
_WEIGHTS_PER_US = 4000.0


@dataclass(frozen=True, slots=True)
class Routing:
    """The sizes of a mixture: T tokens, each with k of E experts."""

    tokens: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise CompileError(f"every token takes {self.top_k} experts of {self.experts}, which can't be")

    @property
    def name(self) -> str:
        """The sizes as a part of kernels' names."""
        return f"{self.tokens}_{self.experts}_{self.top_k}"

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def segments(self) -> int:
        """The most distinct experts a call can need."""
        return min(self.pairs, self.experts)


@dataclass(frozen=True, slots=True)
class Segments:
    """What `route` says to a linear layer, as buffers.

    order: i32 [P], the pairs by expert, ascending within one.
    expert: i32 [S + 1], the expert of each segment; after the last one comes the first again.
    start: i32 [S + 1], the place in ``order`` where each begins; after the last one comes P.
    count: i32 [1], how many there are: the distinct experts.
    """

    order: Expr
    expert: Expr
    start: Expr
    count: Expr

    def each(self, run: Callable[[Expr, Expr, Expr], None]) -> None:
        """Emit run(segment, its first place in the order, its number of pairs) for all segments."""
        with T.serial(self.count[0]) as segment:
            first = T.Bind(self.start[segment])
            run(segment, first, T.Bind(self.start[segment + 1] - first))

    def weight_row(self, segment: Expr, rows: int) -> Expr:
        """Return where a segment's expert begins in a weight of ``rows`` rows an expert; 64 bits, for large ones."""
        return T.cast(self.expert[segment], "int64") * T.int64(rows)


def route(routing: Routing, *, normalise: bool) -> tirx.PrimFunc:
    """Build the kernel that chooses experts and orders the pairs by them.

    ``(logits f32 [T, E]) -> order i32 [P], expert i32 [S + 1], start i32 [S + 1], count i32 [1], weight f32 [T, k]``,
    the first four as in `Segments`. Slot j of a token has its (j + 1)-th largest logit, of equal ones the lower
    expert. weight = exp(logit - largest) / sum, the sum over the chosen experts in slot order if ``normalise``, else
    over all: lane i adds experts i, i+16, ... ascending, then the tree of `lane_sum`.
    """
    tokens, experts, top_k = routing.tokens, routing.experts, routing.top_k
    padded = round_up(experts, LANES)
    weigh = _weigh_against_chosen if normalise else _weigh_against_all

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        logits: T.Buffer((tokens, experts), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((tokens, top_k), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            chosen = T.alloc_buffer((routing.pairs,), "int32")
            for token in loop_over(tokens, tokens * top_k * experts / _KEYS_PER_US):
                values = T.alloc_local((padded,), "float32")
                keys = T.alloc_local((padded,), "int32")
                _load_logits(values, keys, logits, token, experts)
                for slot in T.serial(top_k):
                    best: T.let = _first_of_largest(keys, padded)
                    chosen[token * top_k + slot] = best
                    weight[token, slot] = values[best]
                    keys[best] = _LOWEST_KEY
                weigh(weight, token, top_k, values)
            place = T.alloc_local((experts,), "int32")
            found = T.alloc_local((2,), "int32")
            order_by_expert(routing, chosen, Segments(order, expert, start, count), place, found)

    return kernel


def _load_logits(values: Expr, keys: Expr, logits: Expr, token: Expr, experts: int) -> None:
    """Load a row of logits, and integers that order as they do; lanes past the last expert come below all."""
    for start in range(experts // LANES * LANES, round_up(experts, LANES), LANES):
        T.buffer_store(values, splat(float("-inf")), [lanes(start)])
        T.buffer_store(keys, splat(_LOWEST_KEY), [lanes(start)])
    with T.serial(experts) as e:
        T.buffer_store(values, logits[token, e], [e])
        bits = T.Bind(T.reinterpret("int32", logits[token, e]))
        magnitude = T.Bind(T.bitwise_and(bits, _MAGNITUDE))
        key = T.Select(bits < 0, -magnitude, magnitude)
        T.buffer_store(keys, T.Select(magnitude > _INFINITY, _MAGNITUDE, key), [e])  # a NaN is chosen, to be seen


def _first_of_largest(keys: Expr, padded: int) -> Expr:
    """Return the lowest index of the largest of ``padded`` keys."""
    largest = new_lanes("int32")
    lowest = new_lanes("int32")
    T.buffer_store(largest, splat(_LOWEST_KEY), [lanes(0)])
    T.buffer_store(lowest, splat(padded), [lanes(0)])
    with T.serial(padded // LANES) as step:
        T.buffer_store(largest, T.max(largest[lanes(0)], keys[lanes(step * LANES)]), [lanes(0)])
    key = T.Bind(lane_max(largest[lanes(0)]))
    with T.serial(padded // LANES) as step:
        index = lanes(step * LANES)
        found = T.Select(keys[index] == splat(key), index, splat(padded))
        T.buffer_store(lowest, T.min(lowest[lanes(0)], found), [lanes(0)])
    return lane_fold(lowest[lanes(0)], T.min)


def _weigh_against_chosen(weight: Expr, token: Expr, top_k: int, values: Expr) -> None:
    """Turn a token's chosen logits, the largest first, into weights whose sum is one."""
    total = _exponentials(weight, token, top_k)
    _divide(weight, token, top_k, total[0])


def _weigh_against_all(weight: Expr, token: Expr, top_k: int, values: Expr) -> None:
    """Turn a token's chosen logits, the largest first, into their shares of the softmax over all."""
    sums = new_lanes("float32")
    T.buffer_store(sums, splat(0.0), [lanes(0)])
    largest = T.Bind(weight[token, 0])
    with T.serial(values.shape[0] // LANES) as step:
        decay = exp16(values[lanes(step * LANES)] - splat(largest))
        T.buffer_store(sums, sums[lanes(0)] + decay, [lanes(0)])
    _exponentials(weight, token, top_k)
    _divide(weight, token, top_k, T.Bind(lane_sum(sums[lanes(0)])))


def _exponentials(weight: Expr, token: Expr, top_k: int) -> Expr:
    """Replace a token's logits by exp(logit - first) and return their sum, in slot order, in a local buffer."""
    largest = T.Bind(weight[token, 0])
    decay = T.alloc_local((LANES,), "float32")
    total = T.alloc_local((1,), "float32")
    T.buffer_store(total, T.float32(0.0), [0])
    with T.serial(top_k) as slot:
        T.buffer_store(decay, exp16(splat(weight[token, slot] - largest)), [lanes(0)])
        T.buffer_store(weight, decay[0], [token, slot])
        T.buffer_store(total, total[0] + decay[0], [0])
    return total


def _divide(weight: Expr, token: Expr, top_k: int, total: Expr) -> None:
    with T.serial(top_k) as slot:
        T.buffer_store(weight, weight[token, slot] / total, [token, slot])


def order_by_expert(routing: Routing, chosen: Expr, segments: Segments, place: Expr, found: Expr) -> None:
    """Sort the pairs by counting.

    Args:
        chosen: i32 [P], the expert of each pair.
        place: i32 [E] to work in, first the pairs of an expert, then where its next one goes.
        found: i32 [2] to work in, segments so far and pairs in them.
    """
    with T.serial(routing.experts) as e:
        T.buffer_store(place, T.int32(0), [e])
    with T.serial(routing.pairs) as pair:
        T.buffer_store(place, place[chosen[pair]] + 1, [chosen[pair]])
    for i in range(2):
        T.buffer_store(found, T.int32(0), [i])
    with T.serial(routing.experts) as e, T.If(place[e] > 0), T.Then():
        size = T.Bind(place[e])
        T.buffer_store(segments.expert, e, [found[0]])
        T.buffer_store(segments.start, found[1], [found[0]])
        T.buffer_store(place, found[1], [e])
        T.buffer_store(found, found[0] + 1, [0])
        T.buffer_store(found, found[1] + size, [1])
    T.buffer_store(segments.count, found[0], [0])
    T.buffer_store(segments.expert, segments.expert[0], [found[0]])
    T.buffer_store(segments.start, found[1], [found[0]])
    with T.serial(routing.pairs) as pair:
        expert = T.Bind(chosen[pair])
        T.buffer_store(segments.order, pair, [place[expert]])
        T.buffer_store(place, place[expert] + 1, [expert])


def combine(routing: Routing, columns: int) -> tirx.PrimFunc:
    """Build ``(y f32 [P, D], weight f32 [T, k]) -> out f32 [T, D]``, out[t] = sum_j weight[t, j] * y[t * k + j].

    Slots ascending, by fma from 0.
    """
    tokens, top_k = routing.tokens, routing.top_k
    whole, rest = divmod(columns, LANES)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        y: T.Buffer((routing.pairs, columns), "float32"),
        weight: T.Buffer((tokens, top_k), "float32"),
        out: T.Buffer((tokens, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, routing.pairs * columns / _MIXED_VALUES_PER_US):
                total = new_lanes("float32")
                for step in T.serial(whole):
                    total[lanes(0)] = splat(0.0)
                    for slot in T.serial(top_k):
                        value: T.let = y[token * top_k + slot, lanes(step * LANES)]
                        total[lanes(0)] = fma(splat(weight[token, slot]), value, total[lanes(0)])
                    out[token, lanes(step * LANES)] = total[lanes(0)]
                for i in T.serial(rest):
                    total[0] = T.float32(0.0)
                    for slot in T.serial(top_k):
                        last: T.let = y[token * top_k + slot, whole * LANES + i]
                        total[0] = fma(weight[token, slot], last, total[0])
                    out[token, whole * LANES + i] = total[0]

    return kernel


def expert_linear_float(
    routing: Routing, rows: int, out_features: int, in_features: int, dtype: str = FLOAT32
) -> tirx.PrimFunc:
    """Build the linear layer of the chosen experts on float weights, each packed by `float_linear.pack_float`.

    ``(x f32 [M, K], order, expert, start, count, weight [E * Np/16, K, 16] of dtype) -> y f32 [P, N]``: row p of y is
    row p / (P / M) of x times the weight of p's expert; sums run over k ascending by fma.
    """
    tiles = round_up(out_features, LANES) // LANES
    per_row = routing.pairs // rows

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((rows, in_features), "float32"),
        order: T.Buffer((routing.pairs,), "int32"),
        expert: T.Buffer((routing.segments + 1,), "int32"),
        start: T.Buffer((routing.segments + 1,), "int32"),
        count: T.Buffer((1,), "int32"),
        weight: T.Buffer((routing.experts * tiles, in_features, LANES), dtype),
        y: T.Buffer((routing.pairs, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for tile in loop_over(tiles, routing.pairs * out_features * in_features / _WEIGHTS_PER_US):
                sums = new_lanes("float32")
                edge = new_lanes("float32")  # or the sums would be memory, for only that has a lane i
                for segment in T.serial(count[0]):
                    row: T.let = T.cast(expert[segment], "int64") * tiles + tile
                    for place in T.serial(start[segment], start[segment + 1]):
                        pair: T.let = order[place]
                        sums[lanes(0)] = splat(0.0)
                        for k in T.serial(in_features):
                            value: T.let = splat(x[pair // per_row, k])
                            sums[lanes(0)] = fma(widened(weight[row, k, lanes(0)], dtype), value, sums[lanes(0)])
                        edge[lanes(0)] = sums[lanes(0)]
                        for i in T.serial(T.min(LANES, out_features - tile * LANES)):
                            y[pair, tile * LANES + i] = edge[i]

    return kernel
