# mypy: disable-error-code="valid-type, untyped-decorator"
"""Rotary position embedding, the key/value cache, and causal attention over it.

Caches are float32 ``[1, Hkv, S, hd]``: S is the capacity, row p of a head holds position p. Query head h reads
key/value head h // (H / Hkv). Positions must be valid (position + T <= S): the runtime checks them.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels import loops
from engram_compilers.kernels.intrinsics import Expr, exp16, fma, lane_max, lane_sum, lane_sums, lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over
from engram_compilers.kernels.packing import require_indexable

KEY_BLOCK = 64  # keys between two updates of the running softmax
_TOKEN_BLOCK = 8  # tokens that read a key block while it is in cache
_MOST_ACCUMULATORS = 16  # vectors of output kept in registers
_SCORES_PER_US = 250.0  # of 64 dimensions
_ROTATED_PER_US = 9000.0
_MINUS_INFINITY = float("-inf")


def rope_append(tokens: int, heads: int, kv_heads: int, head_dim: int, capacity: int) -> tirx.PrimFunc:
    """Build the kernel that rotates queries and keys and appends keys and values to the cache.

    ``(qkv f32 [T, (H + 2*Hkv) * hd], cos f32 [S, hd/2], sin f32 [S, hd/2], position i64 [1],
    k_cache f32 [1, Hkv, S, hd], v_cache f32 [1, Hkv, S, hd]) -> q f32 [T, H * hd]``, token t at position + t.
    The caches are changed in place, so the call is

        call_tir_inplace(gv, [qkv, cos, sin, position, k_cache, v_cache], [4, 5, -1],
                         [k_cache_type, v_cache_type, q_type])

    Rotation of the halves (x1, x2) of a head: fma(x1, cos, -(x2 * sin)) and fma(x2, cos, x1 * sin).
    """
    half = head_dim // 2
    width = (heads + 2 * kv_heads) * head_dim
    require_indexable("the key cache", kv_heads, capacity, head_dim)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        qkv: T.Buffer((tokens, width), "float32"),
        cos: T.Buffer((capacity, half), "float32"),
        sin: T.Buffer((capacity, half), "float32"),
        position: T.Buffer((1,), "int64"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        q: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * width / _ROTATED_PER_US):
                row: T.let = T.cast(position[0], "int32") + token
                for head in T.serial(heads):
                    _rotate(q, [token], head * head_dim, qkv, token, head * head_dim, cos, sin, row, half)
                for head in T.serial(kv_heads):
                    _rotate(k_cache, [0, head, row], 0, qkv, token, (heads + head) * head_dim, cos, sin, row, half)
                    for d in T.serial(head_dim // LANES):
                        v_cache[0, head, row, lanes(d * LANES)] = qkv[
                            token, lanes((heads + kv_heads + head) * head_dim + d * LANES)
                        ]

    return kernel


def _rotate(
    target: Expr,
    target_row: list[Expr],
    target_column: Expr,
    qkv: Expr,
    token: Expr,
    column: Expr,
    cos: Expr,
    sin: Expr,
    row: Expr,
    half: int,
) -> None:
    """Write the rotated head at qkv[token, column:] to target[*target_row, target_column:]."""
    width = LANES if half % LANES == 0 else LANES // 2
    minus_one = T.broadcast(T.float32(-1.0), width)
    for i in range(0, half, width):
        x1 = T.Bind(qkv[token, lanes(column + i, width)])
        x2 = T.Bind(qkv[token, lanes(column + half + i, width)])
        c = T.Bind(cos[row, lanes(i, width)])
        s = T.Bind(sin[row, lanes(i, width)])
        T.buffer_store(target, fma(x1, c, minus_one * (x2 * s)), [*target_row, lanes(target_column + i, width)])
        T.buffer_store(target, fma(x2, c, x1 * s), [*target_row, lanes(target_column + half + i, width)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Sizes of one attention layer, and how its work is cut."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    scale: float
    window: int

    @property
    def vectors(self) -> int:
        """Vectors in a head."""
        return self.head_dim // LANES

    @property
    def group(self) -> int:
        """Query heads that read the same key/value head."""
        return self.heads // self.kv_heads

    @property
    def together(self) -> int:
        """Query heads that share each load of a value: a divisor of the group that fits the registers."""
        fitting = (n for n in range(2, self.group + 1) if n * self.vectors <= _MOST_ACCUMULATORS)
        return max((n for n in fitting if self.group % n == 0), default=1)

    @property
    def token_blocks(self) -> int:
        return -(-self.tokens // _TOKEN_BLOCK)

    @property
    def us_per_key(self) -> float:
        """Time one more key in the cache takes."""
        return self.tokens * self.heads * (self.head_dim / 64) / _SCORES_PER_US


def attend(
    tokens: int, heads: int, kv_heads: int, head_dim: int, capacity: int, scale: float, window: int | None = None
) -> tirx.PrimFunc:
    """Build ``(q f32 [T, H*hd], k_cache, v_cache f32 [1, Hkv, S, hd], position i64 [1]) -> out f32 [T, H*hd]``.

    out[t] = softmax(scale * q[t] . K) V over cache rows 0..position+t, or the last ``window`` of them; hd is a
    multiple of 16.

    Order, the same for every T: a score sums lane i over dimensions i, i+16, ... ascending by fma, then adds the
    lanes in the tree of `lane_sums`. Keys go in blocks of 64 aligned to position 0. A block updates the running
    peak, then with c = exp((peak before - peak) * scale) and p = exp((score - peak) * scale) the running
    total = fma(total, c, tree sum of p) and output = output * c, output = fma(p, v, output) key by key
    ascending. At the end out = output / total.
    """
    shape = _Shape(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        scale=scale,
        window=window or capacity,
    )
    require_indexable("the key cache", kv_heads, capacity, head_dim)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        q: T.Buffer((tokens, heads * head_dim), "float32"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), "float32"),
        position: T.Buffer((1,), "int64"),
        out: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _each_task(shape, position, partial(_attend_task, shape, q, k_cache, v_cache, position, out))

    return kernel


def _each_task(shape: _Shape, position: Expr, run: Callable[[Expr], None]) -> None:
    """Emit run(task) over all tasks, in parallel if the position makes enough work of them."""
    tasks = shape.heads // shape.together * shape.token_blocks
    keys = loops.PARALLEL_FROM_US / shape.us_per_key
    if keys <= KEY_BLOCK or keys > shape.window:
        with T.parallel(tasks) if keys <= KEY_BLOCK else T.serial(tasks) as task:
            run(task)
        return
    with T.If(position[0] < int(keys)):
        with T.Then(), T.serial(tasks) as task:
            run(task)
        with T.Else(), T.parallel(tasks) as task:
            run(task)


def _attend_task(shape: _Shape, q: Expr, k_cache: Expr, v_cache: Expr, position: Expr, out: Expr, task: Expr) -> None:
    """Attend with up to 8 tokens and the heads of one task, key block by key block."""
    head = T.Bind(task // shape.token_blocks * shape.together)
    first_token = T.Bind(task % shape.token_blocks * _TOKEN_BLOCK)
    count = T.Bind(T.min(_TOKEN_BLOCK, shape.tokens - first_token))
    first_position = T.Bind(T.cast(position[0], "int32") + first_token)
    running = _start(shape, count)
    first_block = T.max(first_position + 1 - shape.window, 0) // KEY_BLOCK
    with T.serial(first_block, (first_position + count - 1) // KEY_BLOCK + 1) as key_block, T.serial(count) as t:
        start = key_block * KEY_BLOCK
        low = T.Bind(T.max(T.max(first_position + t + 1 - shape.window, 0), start))
        high = T.Bind(T.min(first_position + t, start + KEY_BLOCK - 1))
        with T.If(low <= high), T.Then():
            _score_block(shape, running, q, first_token + t, head, k_cache, low, high)
            _softmax_step(shape, running, t * shape.together)
            _add_values(shape, running, t * shape.together, v_cache, head, low, high)
    with T.serial(count) as t:
        _finish(shape, running, t * shape.together, out, first_token + t, head)


@dataclass(frozen=True, slots=True)
class _Running:
    """Local buffers of a task. A row of the first three is one query head of one token of the task."""

    peak: Expr  # f32 [rows], the largest score so far
    total: Expr  # f32 [rows], sum of exp((score - peak) * scale)
    output: Expr  # f32 [rows, hd], sum of exp(...) * value
    scores: Expr  # f32 [together, 64], of the block at hand; then their exponentials
    rescale: Expr  # f32 [together, 16], exp((peak before - peak) * scale) in every lane


def _start(shape: _Shape, count: Expr) -> _Running:
    rows = _TOKEN_BLOCK * shape.together
    running = _Running(
        peak=T.alloc_local((rows,), "float32"),
        total=T.alloc_local((rows,), "float32"),
        output=T.alloc_local((rows, shape.head_dim), "float32"),
        scores=T.alloc_local((shape.together, KEY_BLOCK), "float32"),
        rescale=T.alloc_local((shape.together, LANES), "float32"),
    )
    with T.serial(count * shape.together) as row:
        T.buffer_store(running.peak, T.float32(_MINUS_INFINITY), [row])
        T.buffer_store(running.total, T.float32(0.0), [row])
        for d in range(shape.vectors):
            T.buffer_store(running.output, splat(0.0), [row, lanes(d * LANES)])
    return running


def _score_block(
    shape: _Shape, running: _Running, q: Expr, token: Expr, head: Expr, k_cache: Expr, low: Expr, high: Expr
) -> None:
    """Fill the scores of a block: q . k for keys low..high, -inf for the rest of the 64."""
    with T.serial(shape.together) as g:
        for i in range(0, KEY_BLOCK, LANES):
            T.buffer_store(running.scores, splat(_MINUS_INFINITY), [g, lanes(i)])
        with T.serial(low // LANES, high // LANES + 1) as step:
            dots = _dots(shape, q, token, head + g, k_cache, step * LANES)
            key = lanes(step * LANES)
            live = T.And(key >= splat(low), key <= splat(high))
            masked = T.Select(live, dots, splat(_MINUS_INFINITY))
            T.buffer_store(running.scores, masked, [g, lanes(step * LANES % KEY_BLOCK)])


def _dots(shape: _Shape, q: Expr, token: Expr, head: Expr, k_cache: Expr, key: Expr) -> Expr:
    """Return q . k for 16 neighbouring keys; rows past the live ones are read, but not past the cache."""
    partial = T.alloc_local((LANES, LANES), "float32")
    for i in range(LANES):
        row = key + i if shape.capacity % LANES == 0 else T.min(key + i, shape.capacity - 1)
        total = splat(0.0)
        for d in range(shape.vectors):
            query = q[token, lanes(head * shape.head_dim + d * LANES)]
            total = fma(query, k_cache[0, head // shape.group, row, lanes(d * LANES)], total)
        T.buffer_store(partial, total, [i, lanes(0)])
    return lane_sums([partial[i, lanes(0)] for i in range(LANES)])


def _softmax_step(shape: _Shape, running: _Running, first_row: Expr) -> None:
    """Raise the peak to the block's, turn its scores into exponentials and add them to the total."""
    with T.serial(shape.together) as g:
        row = first_row + g
        best = T.Bind(T.max(running.peak[row], lane_max(_fold_block(running.scores, g, T.max))))
        scale = T.float32(shape.scale)
        for i in range(0, KEY_BLOCK, LANES):
            below = running.scores[g, lanes(i)] - splat(best)
            T.buffer_store(running.scores, exp16(below * splat(scale)), [g, lanes(i)])
        rescale = exp16(splat((running.peak[row] - best) * scale))
        T.buffer_store(running.rescale, rescale, [g, lanes(0)])
        block_total = lane_sum(_fold_block(running.scores, g, operator.add))
        T.buffer_store(running.total, fma(running.total[row], running.rescale[g, 0], block_total), [row])
        T.buffer_store(running.peak, best, [row])


def _fold_block(scores: Expr, g: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine 64 values to 16 lanes: (first 16 with second) with (third with fourth)."""
    a, b, c, d = (scores[g, lanes(i)] for i in range(0, KEY_BLOCK, LANES))
    return combine(combine(a, b), combine(c, d))


def _add_values(
    shape: _Shape, running: _Running, first_row: Expr, v_cache: Expr, head: Expr, low: Expr, high: Expr
) -> None:
    """Rescale the output and add exponential * value for keys low..high, ascending."""
    sums = T.alloc_local((shape.together, shape.vectors, LANES), "float32")
    every = list(product(range(shape.together), range(shape.vectors)))
    for g, d in every:
        rescaled = running.output[first_row + g, lanes(d * LANES)] * running.rescale[g, lanes(0)]
        T.buffer_store(sums, rescaled, [g, d, lanes(0)])
    with T.serial(low, high + 1) as key:
        for g, d in every:
            value = v_cache[0, head // shape.group, key, lanes(d * LANES)]
            weight = splat(running.scores[g, key % KEY_BLOCK])
            T.buffer_store(sums, fma(weight, value, sums[g, d, lanes(0)]), [g, d, lanes(0)])
    for g, d in every:
        T.buffer_store(running.output, sums[g, d, lanes(0)], [first_row + g, lanes(d * LANES)])


def _finish(shape: _Shape, running: _Running, first_row: Expr, out: Expr, token: Expr, head: Expr) -> None:
    for g, d in product(range(shape.together), range(shape.vectors)):
        mean = running.output[first_row + g, lanes(d * LANES)] / splat(running.total[first_row + g])
        T.buffer_store(out, mean, [token, lanes((head + g) * shape.head_dim + d * LANES)])
