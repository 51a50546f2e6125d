"""A block of keys and values loaded once for many tokens: the keys transposed, both widened to float32.

Lane i of 16 keys' scores is then one vector, and adding lanes is adding vectors, in the tree of `lane_fold`: scores
have the bits of those computed key by key.
"""

from dataclasses import dataclass
from itertools import product

from tvm.script import tirx as T

from engram_compilers.kernels.attention_shape import KEY_BLOCK, AttentionShape, Operands
from engram_compilers.kernels.intrinsics import Expr, converted, fma, lanes, splat, transposed
from engram_compilers.kernels.loops import LANES, largest_divisor

_HEADS_SCORED, _KEYS_SCORED = 4, 2 * LANES  # whose scores are summed at once
_QUARTER = LANES // 4


@dataclass(frozen=True, slots=True)
class KeyTile:
    """A block of 64 keys and values in float32, in local buffers."""

    keys: Expr  # f32 [hd, 64], transposed
    values: Expr | None  # f32 [64, hd], or None where the cache holds them as float32


def load_tile(shape: AttentionShape, operands: Operands, head: Expr, start: Expr) -> KeyTile:
    """Load a block; rows past the live ones are read, but not past the cache."""
    narrow = operands.v_cache.dtype != "float32"
    keys = T.alloc_local((shape.head_dim, KEY_BLOCK), "float32")
    values = T.alloc_local((KEY_BLOCK, shape.head_dim), "float32") if narrow else None
    with T.serial(KEY_BLOCK // LANES) as step, T.serial(shape.vectors) as d:
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
    return KeyTile(keys, values)


def score_tile(
    shape: AttentionShape, scores: Expr, q: Expr, tile: Expr, token: Expr, head: Expr, low: Expr, high: Expr
) -> None:
    """Fill ``scores f32 [heads, 64]`` of a token: those of keys low..high of a transposed block, -inf for the rest."""
    heads = largest_divisor(shape.together, _HEADS_SCORED)
    parts = T.alloc_local((_QUARTER, heads, _KEYS_SCORED), "float32")
    with T.serial(0, shape.together, step=heads) as g, T.serial(0, KEY_BLOCK, step=_KEYS_SCORED) as key:
        with T.serial(_QUARTER) as lane:
            _score_lanes(shape, parts, q, tile, token, head + g, key, lane)
        for h, i in product(range(heads), range(0, _KEYS_SCORED, LANES)):
            first, second, third, fourth = (parts[lane, h, lanes(i)] for lane in range(_QUARTER))
            score = (first + third) + (second + fourth)
            in_reach = T.And(lanes(key + i) >= splat(low), lanes(key + i) <= splat(high))
            T.buffer_store(scores, T.Select(in_reach, score, splat(float("-inf"))), [g + h, lanes(key + i)])


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
