# mypy: disable-error-code="valid-type, untyped-decorator"
"""Select the blocks of past tokens each query attends to: Qwen Sparse Attention's indexer.

The index cache is float32 ``[1, 1, S, hi]``. Row p holds the raw index key of position p, but the last row of a
complete block holds the block's key: the mean of its raw keys, normed and rotated to the block's first position. A
block is ``block`` positions from a multiple of it. Norms are those of `normalise.rms_norm`, rotation is
`rotary.rotate`; a row's bits do not depend on T.
"""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.attention_shape import KEY_BLOCK, live_words
from engram_compilers.kernels.intrinsics import Expr, fma, lane_sum, lane_sums, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.rotary import ROTATED_PER_US, rotate, span, spans

_PRODUCTS_PER_US = 8000.0
_COMPARED_PER_US = 4000.0
_SCORED_TOGETHER = 64  # blocks of a task
_SIGN_BIT = 31


def index_append(tokens: int, heads: int, head_dim: int, rotary_dim: int, capacity: int, eps: float) -> tirx.PrimFunc:
    """Build the kernel that norms and rotates index queries and appends raw index keys to the index cache.

    ``(index_qk f32 [T, (Hi + 1) * hi], query_gain f32 [hi], cos f32 [S, rotary_dim/2], sin, position i64 [1],
    index_cache f32 [1, 1, S, hi]) -> index_query f32 [T, Hi * hi]``; the cache, argument 5, is changed in place.
    """

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        index_qk: T.Buffer((tokens, (heads + 1) * head_dim), "float32"),
        query_gain: T.Buffer((head_dim,), "float32"),
        cos: T.Buffer((capacity, rotary_dim // 2), "float32"),
        sin: T.Buffer((capacity, rotary_dim // 2), "float32"),
        position: T.Buffer((1,), "int64"),
        index_cache: T.Buffer((1, 1, capacity, head_dim), "float32"),
        index_query: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * (heads + 1) * head_dim / ROTATED_PER_US):
                row: T.let = T.cast(position[0], "int32") + token
                normed = T.alloc_local((round_up(head_dim, LANES),), "float32")
                for head in T.serial(heads):
                    _load(normed, index_qk, token, head * head_dim, head_dim)
                    _norm(normed, query_gain, head_dim, eps)
                    rotate(index_query, [token], head * head_dim, normed, [], 0, cos, sin, row, head_dim)
                for i in T.serial(head_dim):
                    index_cache[0, 0, row, i] = index_qk[token, heads * head_dim + i]

    return kernel


def _load(normed: Expr, source: Expr, row: Expr, column: Expr, head_dim: int) -> None:
    """Copy a head to a buffer of whole vectors, zeros after it."""
    T.buffer_store(normed, splat(0.0), [lanes(normed.shape[0] - LANES)])
    for start, width in spans(0, head_dim):
        T.buffer_store(normed, source[row, span(column + start, width)], [span(start, width)])


def _norm(row: Expr, gain: Expr, head_dim: int, eps: float) -> None:
    """Norm a head in a buffer of whole vectors, the rest of which is zero."""
    squares = new_lanes("float32")
    T.buffer_store(squares, splat(0.0), [lanes(0)])
    for start in range(0, head_dim, LANES):
        value = T.Bind(row[lanes(start)])
        T.buffer_store(squares, fma(value, value, squares[lanes(0)]), [lanes(0)])
    mean = fma(lane_sum(squares[lanes(0)]), T.float32(1.0 / head_dim), T.float32(eps))
    factor = T.Bind(T.float32(1.0) / T.sqrt(mean))
    for start, width in spans(0, head_dim):
        scaled = row[span(start, width)] * (factor if width == 1 else splat(factor, width))
        T.buffer_store(row, scaled * gain[span(start, width)], [span(start, width)])


def pool_blocks(tokens: int, head_dim: int, rotary_dim: int, capacity: int, block: int, eps: float) -> tirx.PrimFunc:
    """Build the kernel that puts the keys of the blocks T tokens complete into those blocks' last rows.

    ``(key_gain f32 [hi], cos f32 [S, rotary_dim/2], sin, position i64 [1], index_cache f32 [1, 1, S, hi])``; the
    cache, argument 4, is changed in place. A mean adds rows ascending, then multiplies by 1/block.
    """
    most = (tokens - 1) // block + 1  # blocks that T tokens can complete

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        key_gain: T.Buffer((head_dim,), "float32"),
        cos: T.Buffer((capacity, rotary_dim // 2), "float32"),
        sin: T.Buffer((capacity, rotary_dim // 2), "float32"),
        position: T.Buffer((1,), "int64"),
        index_cache: T.Buffer((1, 1, capacity, head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for task in loop_over(most, most * block * head_dim / ROTATED_PER_US):
                first: T.let = (T.cast(position[0], "int32") // block + task) * block
                if first + block <= T.cast(position[0], "int32") + tokens:
                    mean = T.alloc_local((round_up(head_dim, LANES),), "float32")
                    _mean(mean, index_cache, first, head_dim, block)
                    _norm(mean, key_gain, head_dim, eps)
                    rotate(index_cache, [0, 0, first + block - 1], 0, mean, [], 0, cos, sin, first, head_dim)

    return kernel


def _mean(mean: Expr, index_cache: Expr, first: Expr, head_dim: int, block: int) -> None:
    """Write the mean of ``block`` rows to a buffer of whole vectors, zeros after it."""
    T.buffer_store(mean, splat(0.0), [lanes(mean.shape[0] - LANES)])
    for start, width in spans(0, head_dim):
        T.buffer_store(mean, T.float32(0.0) if width == 1 else splat(0.0, width), [span(start, width)])
    with T.serial(block) as i:
        for start, width in spans(0, head_dim):
            added = mean[span(start, width)] + index_cache[0, 0, first + i, span(start, width)]
            T.buffer_store(mean, added, [span(start, width)])
    for start, width in spans(0, head_dim):
        share = T.float32(1.0 / block) if width == 1 else splat(1.0 / block, width)
        T.buffer_store(mean, mean[span(start, width)] * share, [span(start, width)])


def ranks_width(capacity: int, block: int) -> int:
    """Return the columns of `score_blocks`' ranks: whole tasks of blocks."""
    return round_up(max(capacity // block, 1), _SCORED_TOGETHER)


def score_blocks(tokens: int, heads: int, head_dim: int, capacity: int, block: int) -> tirx.PrimFunc:
    """Build ``(index_query f32 [T, Hi * hi], index_cache f32 [1, 1, S, hi], position i64 [1]) -> ranks i32 [T, B]``.

    A rank is the bits of the score sum_h max(index query h . block key, 0), which order as the scores do since none
    is negative, or -1 for a block the token does not see whole. Ranks of later blocks may be left unset, from the
    first multiple of 64 on. Order: a product sums lane i over dimensions i, i+16, ... by fma, then the tree of
    `lane_sums`; heads ascending.
    """
    width = ranks_width(capacity, block)
    chunks = width // _SCORED_TOGETHER

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        index_query: T.Buffer((tokens, heads * head_dim), "float32"),
        index_cache: T.Buffer((1, 1, capacity, head_dim), "float32"),
        position: T.Buffer((1,), "int64"),
        ranks: T.Buffer((tokens, width), "int32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for task in loop_over(tokens * chunks, tokens * width * heads * head_dim / _PRODUCTS_PER_US):
                token: T.let = task // chunks
                complete: T.let = (T.cast(position[0], "int32") + token + 1) // block
                if task % chunks * _SCORED_TOGETHER < complete:
                    for step in T.serial(_SCORED_TOGETHER // LANES):
                        first: T.let = task % chunks * _SCORED_TOGETHER + step * LANES
                        score = new_lanes("float32")
                        score[lanes(0)] = splat(0.0)
                        for head in T.serial(heads):
                            product = _products(index_query, token, head, index_cache, first, block)
                            score[lanes(0)] = score[lanes(0)] + T.max(product, splat(0.0))
                        ranks[token, lanes(first)] = T.Select(
                            lanes(first) < splat(complete), T.reinterpret("int32x16", score[lanes(0)]), splat(-1)
                        )

    return kernel


def _products(index_query: Expr, token: Expr, head: Expr, index_cache: Expr, first: Expr, block: int) -> Expr:
    """Return the products of an index query with the keys of 16 neighbouring blocks."""
    *_, capacity, head_dim = map(int, index_cache.shape)
    whole = head_dim // LANES * LANES
    partial = T.alloc_local((LANES, LANES), "float32")
    for i in range(LANES):
        row = T.min((first + i) * block + block - 1, capacity - 1)
        total = splat(0.0)
        for d in range(0, whole, LANES):
            total = fma(index_query[token, lanes(head * head_dim + d)], index_cache[0, 0, row, lanes(d)], total)
        T.buffer_store(partial, total, [i, lanes(0)])
        with T.serial(head_dim - whole) as d:
            query, key = index_query[token, head * head_dim + whole + d], index_cache[0, 0, row, whole + d]
            T.buffer_store(partial, fma(query, key, partial[i, d]), [i, d])
    return lane_sums([partial[i, lanes(0)] for i in range(LANES)])


def select_blocks(tokens: int, capacity: int, block: int, count: int) -> tirx.PrimFunc:
    """Build ``(ranks i32 [T, B], position i64 [1]) -> live i32 [T, words]`` for `attention.attend_selected`.

    Live are the tokens of the ``count`` complete blocks of highest rank, the lower one of equals, and those after
    the last complete block. Words are set to the end of the token's own block of 64 keys.
    """
    width, words = ranks_width(capacity, block), live_words(capacity)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        ranks: T.Buffer((tokens, width), "int32"),
        position: T.Buffer((1,), "int64"),
        live: T.Buffer((tokens, words), "int32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * _SIGN_BIT * width / _COMPARED_PER_US):
                seen: T.let = T.cast(position[0], "int32") + token + 1
                complete: T.let = seen // block
                for word in T.serial((seen + KEY_BLOCK - 1) // KEY_BLOCK * (KEY_BLOCK // LANES)):
                    live[token, word] = 0
                chosen = T.alloc_local((2,), "int32")  # the lowest rank that is chosen, blocks of that rank to choose
                _find_lowest_chosen(chosen, ranks, token, complete, count)
                for index in T.serial(complete):
                    tie: T.let = T.And(ranks[token, index] == chosen[0], chosen[1] > 0)
                    if T.Or(ranks[token, index] > chosen[0], tie):
                        for i in T.serial(block):
                            _set_bit(live, token, index * block + i)
                    if tie:
                        chosen[1] = chosen[1] - 1
                for i in T.serial(seen - complete * block):
                    _set_bit(live, token, complete * block + i)

    return kernel


def _set_bit(live: Expr, token: Expr, key: Expr) -> None:
    bit = T.shift_left(T.int32(1), key % LANES)
    T.buffer_store(live, T.bitwise_or(live[token, key // LANES], bit), [token, key // LANES])


def _find_lowest_chosen(chosen: Expr, ranks: Expr, token: Expr, complete: Expr, count: int) -> None:
    """Write the rank of the ``count``-th best block, 0 if there are fewer, and how many blocks of it to choose.

    The rank is the highest that ``count`` blocks reach, found bit by bit from the top.
    """
    T.buffer_store(chosen, T.int32(0), [0])
    with T.If(complete > count), T.Then(), T.serial(_SIGN_BIT) as i:
        higher = T.Bind(T.bitwise_or(chosen[0], T.shift_left(T.int32(1), _SIGN_BIT - 1 - i)))
        with T.If(_reaching(ranks, token, complete, higher) >= count), T.Then():
            T.buffer_store(chosen, higher, [0])
    above = _reaching(ranks, token, complete, chosen[0] + 1)
    T.buffer_store(chosen, count - above, [1])


def _reaching(ranks: Expr, token: Expr, complete: Expr, rank: Expr) -> Expr:
    """Return how many blocks have at least this rank."""
    counts = new_lanes("int32")
    T.buffer_store(counts, splat(0), [lanes(0)])
    with T.serial((complete + LANES - 1) // LANES) as step:
        reached = T.Select(ranks[token, lanes(step * LANES)] >= splat(rank), splat(1), splat(0))
        T.buffer_store(counts, counts[lanes(0)] + reached, [lanes(0)])
    return T.Bind(lane_sum(counts[lanes(0)]))
