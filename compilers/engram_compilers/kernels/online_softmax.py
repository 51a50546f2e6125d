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
from engram_compilers.kernels.attention_shape import KEY_BLOCK, MOST_ACCUMULATORS, AttentionShape, Operands
from engram_compilers.kernels.intrinsics import (
    Expr,
    converted,
    exp16,
    fma,
    lane_max,
    lane_sum,
    lane_sums,
    lanes,
    new_lanes,
    splat,
)
from engram_compilers.kernels.key_tiles import KeyTile, load_tile, score_tile
from engram_compilers.kernels.loops import LANES

_STEPS = KEY_BLOCK // LANES
_MINUS_INFINITY = float("-inf")


def attend_all(shape: AttentionShape, operands: Operands) -> None:
    """Emit attention of all tokens and heads, in parallel if the position makes enough work of it."""
    tasks = shape.heads // shape.together * shape.token_blocks
    keys = loops.PARALLEL_FROM_US / shape.us_per_key
    if tasks == 1 or keys <= KEY_BLOCK or keys > shape.window:
        with T.parallel(tasks) if tasks > 1 and keys <= KEY_BLOCK else T.serial(tasks) as task:
            attend_task(shape, operands, task)
        return
    with T.If(operands.position[0] < int(keys)):
        with T.Then(), T.serial(tasks) as task:
            attend_task(shape, operands, task)
        with T.Else(), T.parallel(tasks) as task:
            attend_task(shape, operands, task)


def attend_task(shape: AttentionShape, operands: Operands, task: Expr) -> None:
    """Attend with the tokens and heads of one task, key block by key block."""
    head = T.Bind(task // shape.token_blocks * shape.together)
    first_token = T.Bind(task % shape.token_blocks * shape.token_block)
    count = T.Bind(T.min(shape.token_block, shape.tokens - first_token))
    first_position = T.Bind(operands.start + first_token)
    first_row = T.Bind(operands.sequence + first_token)
    running = _start(shape, count)
    first_block = T.max(first_position + 1 - shape.window, 0) // KEY_BLOCK
    with T.serial(first_block, (first_position + count - 1) // KEY_BLOCK + 1) as key_block:
        start = key_block * KEY_BLOCK
        tile = load_tile(shape, operands, head, start) if shape.tiled and operands.live is None else None
        with T.serial(count) as t:
            token = first_row + t
            low = T.Bind(T.max(T.max(first_position + t + 1 - shape.window, 0), start))
            high = T.Bind(T.min(first_position + t, start + KEY_BLOCK - 1))
            with T.If(_any_live(operands, token, key_block, low <= high)), T.Then():
                if tile is None:
                    _score_block(shape, running, operands, token, head, low, high)
                else:
                    score_tile(shape, running.scores, operands.q, tile.keys, token, head, low - start, high - start)
                _softmax_step(shape, running, t * shape.together)
                _add_values(shape, running, operands, tile, token, t * shape.together, head, low, high)
    with T.serial(count) as t:
        _finish(shape, running, t * shape.together, operands.out, first_row + t, head)


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
    tile: KeyTile | None,
    token: Expr,
    first_row: Expr,
    head: Expr,
    low: Expr,
    high: Expr,
) -> None:
    """Rescale the output and add exponential * value for keys low..high, as many dimensions at a time as fit."""
    width = min(shape.vectors, MOST_ACCUMULATORS // shape.together)
    for first in range(0, shape.vectors, width):
        every = list(product(range(shape.together), range(min(width, shape.vectors - first))))
        sums = {place: new_lanes("float32") for place in every}
        for g, d in every:
            rescaled = running.output[first_row + g, lanes((first + d) * LANES)] * running.rescale[g, lanes(0)]
            T.buffer_store(sums[g, d], rescaled, [lanes(0)])
        with _each_key(operands, token, low, high) as key:
            for g, d in every:
                place = lanes((first + d) * LANES)
                if tile is None or tile.values is None:
                    value = converted(operands.v_cache[0, head // shape.group, key, place], "float32")
                else:
                    value = tile.values[key % KEY_BLOCK, place]
                weight = splat(running.scores[g, key % KEY_BLOCK])
                T.buffer_store(sums[g, d], fma(weight, value, sums[g, d][lanes(0)]), [lanes(0)])
        for g, d in every:
            T.buffer_store(running.output, sums[g, d][lanes(0)], [first_row + g, lanes((first + d) * LANES)])


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
