# mypy: disable-error-code="valid-type, untyped-decorator"
"""Rotary position embedding, the key/value cache, and causal attention over it.

Caches are float32 ``[1, Hkv, S, hd]``: S is the capacity, row p of a head holds position p. Head h reads
key/value head h // (H / Hkv). Positions must be valid (position + T <= S): the runtime checks them.
"""

import operator
from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, exp16, fma, lane_max, lane_sum, lane_sums, lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over

KEY_BLOCK = 64  # keys between two updates of the running softmax
_TOKEN_BLOCK = 8  # tokens that read a key block while it is in cache
_MOST_ACCUMULATORS = 16  # vectors of output kept in registers
_ROTATED_VALUES_PER_US = 4000.0
_SCORES_PER_US = 350.0  # of 64 dimensions
_TYPICAL_LENGTH = 512  # keys, to judge whether to run in parallel
_MINUS_INFINITY = float("-inf")


def rope_append(tokens: int, heads: int, kv_heads: int, head_dim: int, capacity: int) -> tirx.PrimFunc:
    """Build the kernel that rotates queries and keys, and writes keys and values to the cache.

    ``(qkv f32 [T, (H + 2*Hkv) * hd], cos f32 [S, hd/2], sin f32 [S, hd/2], position i64 [1],
    k_cache f32 [1, Hkv, S, hd], v_cache f32 [1, Hkv, S, hd]) -> q f32 [T, H * hd]``; token t is at
    position + t. To be called so, for the caches are changed in place:

        call_tir_inplace(gv, [qkv, cos, sin, position, k_cache, v_cache], [4, 5, -1],
                         [k_cache_type, v_cache_type, q_type])

    Rotation of the halves (x1, x2) of a head: fma(x1, cos, -(x2*sin)), fma(x2, cos, x1*sin).
    """
    half = head_dim // 2
    width = LANES if half % LANES == 0 else LANES // 2
    first_value = (heads + kv_heads) * head_dim

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        qkv: T.Buffer((tokens, (heads + 2 * kv_heads) * head_dim), "float32"),
        cos: T.Buffer((capacity, half), "float32"),
        sin: T.Buffer((capacity, half), "float32"),
        position: T.Buffer((1,), "int64"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        q: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})

        @T.inline
        def rotate(token, row, head, i, store):
            x1: T.let = qkv[token, lanes(head * head_dim + i, width)]
            x2: T.let = qkv[token, lanes(head * head_dim + half + i, width)]
            c: T.let = cos[row, lanes(i, width)]
            s: T.let = sin[row, lanes(i, width)]
            store(i, fma(x1, c, T.broadcast(T.float32(-1.0), width) * (x2 * s)))
            store(half + i, fma(x2, c, x1 * s))

        with T.sblock("root"):
            for token in loop_over(tokens, tokens * (heads + 2 * kv_heads) * head_dim / _ROTATED_VALUES_PER_US):
                row: T.let = T.cast(position[0], "int32") + token
                for head in T.serial(heads):

                    @T.inline
                    def store_query(i, value):
                        q[token, lanes(head * head_dim + i, width)] = value

                    for step in T.serial(half // width):
                        rotate(token, row, head, step * width, store_query)
                for kv_head in T.serial(kv_heads):

                    @T.inline
                    def store_key(i, value):
                        k_cache[0, kv_head, row, lanes(i, width)] = value

                    for step in T.serial(half // width):
                        rotate(token, row, heads + kv_head, step * width, store_key)
                    for step in T.serial(head_dim // LANES):
                        v_cache[0, kv_head, row, lanes(step * LANES)] = qkv[
                            token, lanes(first_value + kv_head * head_dim + step * LANES)
                        ]

    return kernel


def _between(index: Expr, first: Expr, last: Expr) -> Expr:
    return T.And(index >= splat(first), index <= splat(last))


def _row_sums(vectors: Expr) -> Expr:
    """Return the lane sums of the 16 rows of a local buffer, one to a lane."""
    return lane_sums([vectors[i, lanes(0)] for i in range(LANES)])


def _fold_block(scores: Expr, row: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine a row of 64 values to 16 lanes: (0 with 1) with (2 with 3)."""
    a, b, c, d = (scores[row, lanes(i * LANES)] for i in range(KEY_BLOCK // LANES))
    return combine(combine(a, b), combine(c, d))


def _heads_at_once(group: int, vectors: int) -> int:
    """Return how many query heads of a group share a load of a value row: a divisor that fits the registers."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * vectors <= _MOST_ACCUMULATORS))


def attend(
    tokens: int, heads: int, kv_heads: int, head_dim: int, capacity: int, scale: float, window: int | None = None
) -> tirx.PrimFunc:
    """Build ``(q f32 [T, H*hd], k_cache, v_cache f32 [1, Hkv, S, hd], position i64 [1]) -> out f32 [T, H*hd]``.

    out[t] = softmax(scale * q[t] . K) V over cache rows 0..position+t, or the last ``window`` of them.

    Order, the same for every T: a score sums lane i over dimensions i, i+16, ... ascending by fma, then the
    tree of `lane_sums`. Keys go in blocks of 64 aligned to position 0; a block updates the running maximum m,
    sum l = fma(l, c, tree sum of p) and output o = o*c, then o = fma(p, v, o) key by key ascending, with
    p = exp((score - m) * scale), c = exp((m before - m) * scale). At the end out = o / l.
    """
    vectors = head_dim // LANES
    group = heads // kv_heads
    together = _heads_at_once(group, vectors)
    token_blocks = -(-tokens // _TOKEN_BLOCK)
    reach = capacity if window is None else window
    work_us = tokens * heads * _TYPICAL_LENGTH * (head_dim / 64) / _SCORES_PER_US

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        q: T.Buffer((tokens, heads * head_dim), "float32"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        position: T.Buffer((1,), "int64"),
        out: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})

        @T.inline
        def score_keys(scores, g, token, head, kv_head, key, first, last):
            partial = T.alloc_local((LANES, LANES), "float32")
            for i in T.unroll(LANES):
                partial[i, lanes(0)] = splat(0.0)
                for d in T.unroll(vectors):
                    partial[i, lanes(0)] = fma(
                        q[token, lanes(head * head_dim + d * LANES)],
                        k_cache[
                            0,
                            kv_head,
                            key + i if capacity % LANES == 0 else T.min(key + i, capacity - 1),
                            lanes(d * LANES),
                        ],
                        partial[i, lanes(0)],
                    )
            scores[g, lanes(key % KEY_BLOCK)] = T.Select(
                _between(lanes(key), first, last), _row_sums(partial), splat(_MINUS_INFINITY)
            )

        @T.inline
        def softmax_step(scores, g, peak, total, rescale, state):
            best: T.let = T.max(peak[state], lane_max(_fold_block(scores, g, T.max)))
            for i in T.unroll(KEY_BLOCK // LANES):
                scores[g, lanes(i * LANES)] = exp16((scores[g, lanes(i * LANES)] - splat(best)) * splat(scale))
            rescale[g, lanes(0)] = exp16(splat((peak[state] - best) * T.float32(scale)))
            total[state] = fma(total[state], rescale[g, 0], lane_sum(_fold_block(scores, g, operator.add)))
            peak[state] = best

        @T.inline
        def add_values(output, weights, rescale, state, kv_head, block, low, high):
            sums = T.alloc_local((together, vectors, LANES), "float32")
            for g in T.unroll(together):
                for d in T.unroll(vectors):
                    sums[g, d, lanes(0)] = output[state + g, lanes(d * LANES)] * rescale[g, lanes(0)]
            for key in T.serial(low, high + 1):
                for d in T.unroll(vectors):
                    for g in T.unroll(together):
                        sums[g, d, lanes(0)] = fma(
                            splat(weights[g, key - block]),
                            v_cache[0, kv_head, key, lanes(d * LANES)],
                            sums[g, d, lanes(0)],
                        )
            for g in T.unroll(together):
                for d in T.unroll(vectors):
                    output[state + g, lanes(d * LANES)] = sums[g, d, lanes(0)]

        with T.sblock("root"):
            for task in loop_over(heads // together * token_blocks, work_us):
                head: T.let = task // token_blocks * together
                token_0: T.let = task % token_blocks * _TOKEN_BLOCK
                count: T.let = T.min(_TOKEN_BLOCK, tokens - token_0)
                position_0: T.let = T.cast(position[0], "int32") + token_0
                peak = T.alloc_local((_TOKEN_BLOCK * together,), "float32")
                total = T.alloc_local((_TOKEN_BLOCK * together,), "float32")
                output = T.alloc_local((_TOKEN_BLOCK * together, head_dim), "float32")
                scores = T.alloc_local((together, KEY_BLOCK), "float32")
                rescale = T.alloc_local((together, LANES), "float32")
                for state in T.serial(count * together):
                    peak[state] = T.float32(_MINUS_INFINITY)
                    total[state] = T.float32(0)
                    for d in T.unroll(vectors):
                        output[state, lanes(d * LANES)] = splat(0.0)
                for key_block in T.serial(
                    T.max(position_0 + 1 - reach, 0) // KEY_BLOCK, (position_0 + count - 1) // KEY_BLOCK + 1
                ):
                    for t in T.serial(count):
                        block: T.let = key_block * KEY_BLOCK
                        first: T.let = T.max(position_0 + t + 1 - reach, 0)
                        low: T.let = T.max(first, block)
                        high: T.let = T.min(position_0 + t, block + KEY_BLOCK - 1)
                        if low <= high:
                            for g in T.unroll(together):
                                for i in T.unroll(KEY_BLOCK // LANES):
                                    scores[g, lanes(i * LANES)] = splat(_MINUS_INFINITY)
                                for step in T.serial(low // LANES, high // LANES + 1):
                                    score_keys(scores, g, token_0 + t, head + g, head // group, step * LANES, low, high)
                                softmax_step(scores, g, peak, total, rescale, t * together + g)
                            add_values(output, scores, rescale, t * together, head // group, block, low, high)
                for t in T.serial(count):
                    for g in T.unroll(together):
                        for d in T.unroll(vectors):
                            out[token_0 + t, lanes((head + g) * head_dim + d * LANES)] = output[
                                t * together + g, lanes(d * LANES)
                            ] / splat(total[t * together + g])

    return kernel
