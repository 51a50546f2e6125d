"""Attention in one pass over the keys: a running softmax whose order of sums no number of tokens changes.

A score sums lane i over dimensions i, i+16, ... ascending by fma, then adds the lanes in the tree of `lane_sums`. Keys
go in blocks of 64 aligned to position 0. A block updates the running peak, then with
c = exp((peak before - peak) * scale) and p = exp((score - peak) * scale) the running total = fma(total, c, tree sum of
p) and output = output * c, output = fma(p, v, output) key by key ascending. At the end out = output / total. Keys that
are not live have p = 0: leaving them out changes no bit.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from tvm.script import tirx as T

from engram_compilers.kernels import loops
from engram_compilers.kernels.intrinsics import (
    Expr,
    converted,
    exp16,
    fma,
    lane_max,
    lane_sum,
    lane_sums,
    lanes,
    splat,
    transposed,
)
from engram_compilers.kernels.loops import LANES

KEY_BLOCK = 64  # keys between two updates of the running softmax
_STEPS = KEY_BLOCK // LANES
_TOKEN_BLOCK = 8  # tokens that read a key block while it is in cache
_TILED_TOKENS = 16  # tokens that read a transposed key block, which takes as long as the scores of about four
_HEADS_SCORED, _KEYS_SCORED = 4, 2 * LANES  # whose scores on a transposed block are summed at once
_QUARTER = LANES // 4
_MOST_ACCUMULATORS = 16  # vectors of output kept in registers
_WIDE_TOGETHER = 4  # measured on 16 heads of 256: 4 take 0.6 of the time of 1 at 2,000 tokens, 0.3 at 30,000
_FEWEST_TASKS = 4  # left to the threads by heads that go together
_SCORES_PER_US = 250.0  # of 64 dimensions
_MINUS_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
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
        """Query heads that share each load of a value: a divisor of the group."""
        fitting = (n for n in range(2, self.group + 1) if n * self.vectors <= _MOST_ACCUMULATORS or self._pays(n))
        return max((n for n in fitting if self.group % n == 0), default=1)

    def _pays(self, together: int) -> bool:
        """Whether wide heads gain by it, though their values are then read a part at a time."""
        return together <= _WIDE_TOGETHER and self.heads // together * self.token_blocks >= _FEWEST_TASKS

    @property
    def tiled(self) -> bool:
        """Whether key blocks are transposed first, for tokens enough to share them."""
        return self.tokens >= _TILED_TOKENS

    @property
    def token_block(self) -> int:
        """Tokens that read a key block together."""
        return _TILED_TOKENS if self.tiled else _TOKEN_BLOCK

    @property
    def token_blocks(self) -> int:
        """Blocks of tokens that read a key block together."""
        return -(-self.tokens // self.token_block)

    @property
    def us_per_key(self) -> float:
        """Time one more key in the cache takes."""
        return self.tokens * self.heads * (self.head_dim / 64) / _SCORES_PER_US


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Buffers of one attention layer.

    Attributes:
        q: f32 ``[T, H * hd]``, rotated.
        k_cache: f32 or f16 ``[1, Hkv, S, hd]``. ``v_cache`` alike.
        position: i64 ``[1]``.
        live: None, or i32 ``[T, words]``: bit i of word w says whether a token attends to key 16 * w + i.
        out: f32 ``[T, H * hd]``.
    """

    q: Expr
    k_cache: Expr
    v_cache: Expr
    position: Expr
    live: Expr | None
    out: Expr


def live_words(capacity: int) -> int:
    """Return the words of 16 keys in a row of ``live``, whole key blocks."""
    return loops.round_up(capacity, KEY_BLOCK) // LANES


def attend_all(shape: AttentionShape, operands: Operands) -> None:
    """Emit attention of all tokens and heads, in parallel if the position makes enough work of it."""
    tasks = shape.heads // shape.together * shape.token_blocks
    keys = loops.PARALLEL_FROM_US / shape.us_per_key
    if keys <= KEY_BLOCK or keys > shape.window:
        with T.parallel(tasks) if keys <= KEY_BLOCK else T.serial(tasks) as task:
            _attend_task(shape, operands, task)
        return
    with T.If(operands.position[0] < int(keys)):
        with T.Then(), T.serial(tasks) as task:
            _attend_task(shape, operands, task)
        with T.Else(), T.parallel(tasks) as task:
            _attend_task(shape, operands, task)


def _attend_task(shape: AttentionShape, operands: Operands, task: Expr) -> None:
    """Attend with up to 8 tokens and the heads of one task, key block by key block."""
    head = T.Bind(task // shape.token_blocks * shape.together)
    first_token = T.Bind(task % shape.token_blocks * shape.token_block)
    count = T.Bind(T.min(shape.token_block, shape.tokens - first_token))
    first_position = T.Bind(T.cast(operands.position[0], "int32") + first_token)
    running = _start(shape, count)
    first_block = T.max(first_position + 1 - shape.window, 0) // KEY_BLOCK
    with T.serial(first_block, (first_position + count - 1) // KEY_BLOCK + 1) as key_block:
        start = key_block * KEY_BLOCK
        tile = _load_tile(shape, operands, head, start) if shape.tiled and operands.live is None else None
        with T.serial(count) as t:
            token = first_token + t
            low = T.Bind(T.max(T.max(first_position + t + 1 - shape.window, 0), start))
            high = T.Bind(T.min(first_position + t, start + KEY_BLOCK - 1))
            with T.If(_any_live(operands, token, key_block, low <= high)), T.Then():
                if tile is None:
                    _score_block(shape, running, operands, token, head, low, high)
                else:
                    _score_tile(shape, running, operands.q, tile.keys, token, head, low - start, high - start)
                _softmax_step(shape, running, t * shape.together)
                _add_values(shape, running, operands, tile, token, t * shape.together, head, low, high)
    with T.serial(count) as t:
        _finish(shape, running, t * shape.together, operands.out, first_token + t, head)


def _any_live(operands: Operands, token: Expr, key_block: Expr, in_reach: Expr) -> Expr:
    if operands.live is None:
        return in_reach
    words = [operands.live[token, key_block * _STEPS + step] for step in range(_STEPS)]
    joined = T.bitwise_or(T.bitwise_or(words[0], words[1]), T.bitwise_or(words[2], words[3]))
    return T.And(in_reach, joined != 0)


@contextlib.contextmanager
def _if_live(operands: Operands, token: Expr, step: Expr) -> Iterator[None]:
    """Emit what follows for steps of 16 keys with a live one."""
    if operands.live is None:
        yield
        return
    with T.If(operands.live[token, step] != 0), T.Then():
        yield


@dataclass(frozen=True, slots=True)
class _Running:
    """Local buffers of a task. A row of the first three is one query head of one token of the task."""

    peak: Expr  # f32 [rows], the largest score so far
    total: Expr  # f32 [rows], sum of exp((score - peak) * scale)
    output: Expr  # f32 [rows, hd], sum of exp(...) * value
    scores: Expr  # f32 [together, 64], of the block at hand; then their exponentials
    rescale: Expr  # f32 [together, 16], exp((peak before - peak) * scale) in every lane


def _start(shape: AttentionShape, count: Expr) -> _Running:
    rows = shape.token_block * shape.together
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
    shape: AttentionShape, running: _Running, operands: Operands, token: Expr, head: Expr, low: Expr, high: Expr
) -> None:
    """Fill the scores of a block: those of live keys in low..high, -inf for the rest of the 64."""
    with T.serial(shape.together) as g:
        for i in range(0, KEY_BLOCK, LANES):
            T.buffer_store(running.scores, splat(_MINUS_INFINITY), [g, lanes(i)])
        with T.serial(low // LANES, high // LANES + 1) as step, _if_live(operands, token, step):
            scores = _dots(shape, operands.q, token, head + g, operands.k_cache, step * LANES)
            masked = T.Select(_live(operands, token, step, low, high), scores, splat(_MINUS_INFINITY))
            T.buffer_store(running.scores, masked, [g, lanes(step * LANES % KEY_BLOCK)])


@dataclass(frozen=True, slots=True)
class _Tile:
    """A block of 64 keys and values in float32, in local buffers."""

    keys: Expr  # f32 [hd, 64], transposed
    values: Expr | None  # f32 [64, hd], or None where the cache holds them as float32


def _load_tile(shape: AttentionShape, operands: Operands, head: Expr, start: Expr) -> _Tile:
    """Load a block; rows past the live ones are read, but not past the cache."""
    narrow = operands.v_cache.dtype != "float32"
    keys = T.alloc_local((shape.head_dim, KEY_BLOCK), "float32")
    values = T.alloc_local((KEY_BLOCK, shape.head_dim), "float32") if narrow else None
    with T.serial(_STEPS) as step, T.serial(shape.vectors) as d:
        loaded = []
        for i in range(LANES):
            key = start + step * LANES + i
            row = key if shape.capacity % KEY_BLOCK == 0 else T.min(key, shape.capacity - 1)
            place = (0, head // shape.group, row, lanes(d * LANES))
            loaded.append(T.Bind(converted(operands.k_cache[place], "float32")))
            if values is not None:
                value = converted(operands.v_cache[place], "float32")
                T.buffer_store(values, value, [step * LANES + i, lanes(d * LANES)])
        for i, dimension in enumerate(transposed(loaded)):
            T.buffer_store(keys, dimension, [d * LANES + i, lanes(step * LANES)])
    return _Tile(keys, values)


def _score_tile(
    shape: AttentionShape, running: _Running, q: Expr, tile: Expr, token: Expr, head: Expr, low: Expr, high: Expr
) -> None:
    """Fill the scores of a block from its transposed keys: those of keys low..high of it, -inf for the rest."""
    heads = loops.largest_divisor(shape.together, _HEADS_SCORED)
    parts = T.alloc_local((_QUARTER, heads, _KEYS_SCORED), "float32")
    with T.serial(0, shape.together, step=heads) as g, T.serial(0, KEY_BLOCK, step=_KEYS_SCORED) as key:
        with T.serial(_QUARTER) as lane:
            _score_lanes(shape, parts, q, tile, token, head + g, key, lane)
        for h, i in product(range(heads), range(0, _KEYS_SCORED, LANES)):
            first, second, third, fourth = (parts[lane, h, lanes(i)] for lane in range(_QUARTER))
            score = (first + third) + (second + fourth)
            in_reach = T.And(lanes(key + i) >= splat(low), lanes(key + i) <= splat(high))
            T.buffer_store(running.scores, T.Select(in_reach, score, splat(_MINUS_INFINITY)), [g + h, lanes(key + i)])


def _score_lanes(
    shape: AttentionShape, parts: Expr, q: Expr, tile: Expr, token: Expr, head: Expr, key: Expr, lane: Expr
) -> None:
    """Store what lanes lane, lane + 8, lane + 4 and lane + 12 of dot products sum, added as `lane_fold` adds them."""
    places = [(h, i) for h in range(int(parts.shape[1])) for i in range(0, _KEYS_SCORED, LANES)]

    def products(lane: Expr) -> list[Expr]:
        totals = [splat(0.0) for _ in places]
        for d in range(0, shape.head_dim, LANES):
            keys = {i: T.Bind(tile[d + lane, lanes(key + i)]) for _, i in places}
            queries = {h: T.Bind(splat(q[token, (head + h) * shape.head_dim + d + lane])) for h, _ in places}
            totals = [T.Bind(fma(queries[h], keys[i], t)) for (h, i), t in zip(places, totals, strict=True)]
        return totals

    def added(a: list[Expr], b: list[Expr]) -> list[Expr]:
        return [T.Bind(x + y) for x, y in zip(a, b, strict=True)]

    low = added(products(lane), products(lane + 8))
    sums = added(low, added(products(lane + 4), products(lane + 12)))
    for (h, i), total in zip(places, sums, strict=True):
        T.buffer_store(parts, total, [lane, h, lanes(i)])


def _live(operands: Operands, token: Expr, step: Expr, low: Expr, high: Expr) -> Expr:
    """Return which of a step's 16 keys count."""
    key = lanes(step * LANES)
    in_reach = T.And(key >= splat(low), key <= splat(high))
    if operands.live is None:
        return in_reach
    bits = T.bitwise_and(T.shift_right(splat(operands.live[token, step]), lanes(0)), splat(1))
    return T.And(in_reach, bits != splat(0))


def _dots(shape: AttentionShape, q: Expr, token: Expr, head: Expr, k_cache: Expr, key: Expr) -> Expr:
    """Return q . k for 16 neighbouring keys; rows past the live ones are read, but not past the cache."""
    parts = T.alloc_local((LANES, LANES), "float32")
    for i in range(LANES):
        row = key + i if shape.capacity % LANES == 0 else T.min(key + i, shape.capacity - 1)
        total = splat(0.0)
        for d in range(shape.vectors):
            query = q[token, lanes(head * shape.head_dim + d * LANES)]
            cached = converted(k_cache[0, head // shape.group, row, lanes(d * LANES)], "float32")
            total = fma(query, cached, total)
        T.buffer_store(parts, total, [i, lanes(0)])
    return lane_sums([parts[i, lanes(0)] for i in range(LANES)])


def _softmax_step(shape: AttentionShape, running: _Running, first_row: Expr) -> None:
    """Raise the peak to the block's, turn its scores into exponentials and add them to the total."""
    scale = T.float32(shape.scale)
    with T.serial(shape.together) as g:
        row = first_row + g
        best = T.Bind(T.max(running.peak[row], lane_max(_fold_block(running.scores, g, T.max))))
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
    shape: AttentionShape,
    running: _Running,
    operands: Operands,
    tile: _Tile | None,
    token: Expr,
    first_row: Expr,
    head: Expr,
    low: Expr,
    high: Expr,
) -> None:
    """Rescale the output and add exponential * value for keys low..high, as many dimensions at a time as fit."""
    width = min(shape.vectors, _MOST_ACCUMULATORS // shape.together)
    sums = T.alloc_local((shape.together, width, LANES), "float32")
    for first in range(0, shape.vectors, width):
        every = list(product(range(shape.together), range(min(width, shape.vectors - first))))
        for g, d in every:
            rescaled = running.output[first_row + g, lanes((first + d) * LANES)] * running.rescale[g, lanes(0)]
            T.buffer_store(sums, rescaled, [g, d, lanes(0)])
        with _each_key(operands, token, low, high) as key:
            for g, d in every:
                place = lanes((first + d) * LANES)
                if tile is None or tile.values is None:
                    value = converted(operands.v_cache[0, head // shape.group, key, place], "float32")
                else:
                    value = tile.values[key % KEY_BLOCK, place]
                weight = splat(running.scores[g, key % KEY_BLOCK])
                T.buffer_store(sums, fma(weight, value, sums[g, d, lanes(0)]), [g, d, lanes(0)])
        for g, d in every:
            T.buffer_store(running.output, sums[g, d, lanes(0)], [first_row + g, lanes((first + d) * LANES)])


@contextlib.contextmanager
def _each_key(operands: Operands, token: Expr, low: Expr, high: Expr) -> Iterator[Expr]:
    """Emit what follows for each key of low..high, ascending; steps of 16 without a live key are left out."""
    if operands.live is None:
        with T.serial(low, high + 1) as key:
            yield key
        return
    with T.serial(low // LANES, high // LANES + 1) as step, _if_live(operands, token, step):
        # Bound first: TVM shifts a loop that starts above 0, but not its variable in the bounds of a loop inside.
        first, last = T.Bind(T.max(low, step * LANES)), T.Bind(T.min(high, (step + 1) * LANES - 1))
        with T.serial(first, last + 1) as key:
            yield key


def _finish(shape: AttentionShape, running: _Running, first_row: Expr, out: Expr, token: Expr, head: Expr) -> None:
    for g, d in product(range(shape.together), range(shape.vectors)):
        mean = running.output[first_row + g, lanes(d * LANES)] / splat(running.total[first_row + g])
        T.buffer_store(out, mean, [token, lanes((head + g) * shape.head_dim + d * LANES)])
