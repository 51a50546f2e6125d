# mypy: disable-error-code="valid-type, untyped-decorator"
"""The key/value cache, and causal attention over it; what caches hold is in `engram_compilers.kernels.attention`.

Order of `attend`: 128 keys at a time, a thread a key: the dot product runs over the head's dimensions ascending by fma,
the largest score and the sum of exponentials in the tree of `blocks`, and the running sums are rescaled by the peak's
change. A dimension of the output then takes the keys of its thread's part ascending by fma, and the parts ascending.
"""

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, THREADS, added, combined, fma, own_columns
from engram_compilers.kernels.gpu.rotary import HEAD_THREADS, rotate
from engram_compilers.kernels.intrinsics import Expr, converted
from engram_compilers.kernels.packing import require_indexable
from engram_runtime.errors import CompileError

_MINUS_INFINITY = float("-inf")


def rope_append(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    rotary_dim: int | None = None,
    cache_dtype: str = "float32",
) -> tirx.PrimFunc:
    """Build the kernel that rotates queries and keys and appends keys and values to the cache.

    Arguments and results are those of `engram_compilers.kernels.attention.rope_append`; a block a head of a token.
    """
    half = (rotary_dim or head_dim) // 2
    width = (heads + 2 * kv_heads) * head_dim
    require_indexable("the key cache", kv_heads, capacity, head_dim)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        qkv: T.Buffer((tokens, width), "float32"),
        cos: T.Buffer((capacity, half), "float32"),
        sin: T.Buffer((capacity, half), "float32"),
        position: T.Buffer((1,), "int64"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        q: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(tokens, "y"):
                for head in blocks.blocks(heads + 2 * kv_heads):
                    for thread in blocks.threads(HEAD_THREADS):
                        _append(qkv, cos, sin, position, k_cache, v_cache, q, token, head, thread)

    return kernel


def _append(
    qkv: Expr,
    cos: Expr,
    sin: Expr,
    position: Expr,
    k_cache: Expr,
    v_cache: Expr,
    q: Expr,
    token: Expr,
    head: Expr,
    thread: Expr,
) -> None:
    """Emit what becomes of one head of one row of ``qkv``: queries come first, then keys, then values."""
    _, kv_heads, _, head_dim = (int(size) for size in k_cache.shape)
    heads = int(q.shape[1]) // head_dim
    row = T.Bind(T.cast(position[0], "int32") + token)
    source = [token, head * head_dim]
    with T.If(head < heads), T.Then():
        rotate(q, source, qkv, source, cos, sin, row, head_dim, thread)
    with T.If(T.And(head >= heads, head < heads + kv_heads)), T.Then():
        rotate(k_cache, [0, head - heads, row, 0], qkv, source, cos, sin, row, head_dim, thread)
    with T.If(head >= heads + kv_heads), T.Then(), own_columns(head_dim, thread, HEAD_THREADS) as (_, d):
        value = converted(T.Bind(qkv[token, head * head_dim + d]), v_cache.dtype, 1)
        T.buffer_store(v_cache, value, [0, head - heads - kv_heads, row, d])


def attend(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    scale: float,
    window: int | None = None,
    cache_dtype: str = "float32",
) -> tirx.PrimFunc:
    """Build ``(q f32 [T, H*hd], k_cache, v_cache [1, Hkv, S, hd], position i64 [1]) -> out f32 [T, H*hd]``.

    out[t] = softmax(scale * q[t] . K) V over cache rows 0..position+t, or the last ``window`` of them; a block a head
    of a token.

    Raises:
        CompileError: the window holds no token.
    """
    if window is not None and window < 1:
        raise CompileError(
            f"attention has a window of {window} tokens, kernels need at least 1; export the model again"
        )
    require_indexable("the key cache", kv_heads, capacity, head_dim)
    reach = capacity if window is None else window

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        q: T.Buffer((tokens, heads * head_dim), "float32"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        position: T.Buffer((1,), "int64"),
        out: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(tokens, "y"):
                for head in blocks.blocks(heads):
                    for thread in blocks.threads():
                        _attend(_Task(q, k_cache, v_cache, out, token, head, thread, scale, reach), position)

    return kernel


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What a thread attends with: its key of each 128, then its dimensions of the output."""

    q: Expr
    k_cache: Expr
    v_cache: Expr
    out: Expr
    token: Expr
    head: Expr
    thread: Expr
    scale: float
    window: int

    @property
    def head_dim(self) -> int:
        return int(self.k_cache.shape[3])

    @property
    def cache_head(self) -> Expr:
        heads, kv_heads = int(self.q.shape[1]) // self.head_dim, int(self.k_cache.shape[1])
        return self.head // (heads // kv_heads)

    @property
    def parts(self) -> int:
        """How many threads share a dimension of the output, each with keys of its own."""
        return max(THREADS // self.head_dim, 1) if THREADS % self.head_dim == 0 else 1


def _attend(task: _Task, position: Expr) -> None:
    query = blocks.shared((task.head_dim,), "float32")
    with own_columns(task.head_dim, task.thread) as (_, d):
        T.buffer_store(query, task.q[task.token, task.head * task.head_dim + d], [d])
    weights = blocks.shared((THREADS,), "float32")
    running = blocks.local(2, "float32")  # the peak, and the sum of exp((score - peak) * scale)
    T.buffer_store(running, T.float32(_MINUS_INFINITY), [0])
    T.buffer_store(running, T.float32(0.0), [1])
    width = THREADS // task.parts
    output = blocks.local(blocks.steps(task.head_dim, width), "float32")
    with own_columns(task.head_dim, task.thread % width, width) as (step, _):
        T.buffer_store(output, T.float32(0.0), [step])
    blocks.synchronise()
    high = T.Bind(T.cast(position[0], "int32") + task.token)
    low = T.Bind(T.max(high + 1 - task.window, 0))
    first = T.Bind(low // THREADS)
    with T.serial(high // THREADS + 1 - first) as step:
        _attend_to_tile(task, query, weights, running, output, T.Bind((first + step) * THREADS), low, high)
    _finish(task, running, output)


def _attend_to_tile(
    task: _Task, query: Expr, weights: Expr, running: Expr, output: Expr, start: Expr, low: Expr, high: Expr
) -> None:
    """Take in the keys of low..high among 128 from ``start`` on."""
    score = blocks.local(1, "float32")
    T.buffer_store(score, T.float32(_MINUS_INFINITY), [0])
    key = T.Bind(start + task.thread)
    with T.If(T.And(key >= low, key <= high)), T.Then():
        T.buffer_store(score, T.float32(0.0), [0])
        with T.serial(task.head_dim) as d:
            cached = converted(task.k_cache[0, task.cache_head, key, d], "float32", 1)
            T.buffer_store(score, fma(query[d], cached, score[0]), [0])
    peak = T.Bind(T.max(running[0], combined(score[0], task.thread, T.max)))
    weight = T.Bind(T.exp((score[0] - peak) * T.float32(task.scale)))
    rescale = T.Bind(T.exp((running[0] - peak) * T.float32(task.scale)))
    T.buffer_store(weights, weight, [task.thread])
    total = added(weight, task.thread)  # it synchronises, so all weights are written
    T.buffer_store(running, fma(running[1], rescale, total), [1])
    T.buffer_store(running, peak, [0])
    _add_values(task, weights, output, rescale, start, low, high)
    blocks.synchronise()


def _add_values(task: _Task, weights: Expr, output: Expr, rescale: Expr, start: Expr, low: Expr, high: Expr) -> None:
    width = THREADS // task.parts
    span = THREADS // task.parts  # keys of a part
    part = T.Bind(task.thread // width)
    first = T.Bind(T.max(low - start, part * span))
    end = T.Bind(T.min(high - start + 1, part * span + span))
    with own_columns(task.head_dim, task.thread % width, width) as (step, d):
        T.buffer_store(output, output[step] * rescale, [step])
        with T.serial(T.max(end - first, 0)) as i:
            value = converted(task.v_cache[0, task.cache_head, start + first + i, d], "float32", 1)
            T.buffer_store(output, fma(weights[first + i], value, output[step]), [step])


def _finish(task: _Task, running: Expr, output: Expr) -> None:
    """Add up the parts and divide by the sum of exponentials."""
    width = THREADS // task.parts
    parts = blocks.shared((task.parts, task.head_dim), "float32")
    with own_columns(task.head_dim, task.thread % width, width) as (step, d):
        T.buffer_store(parts, output[step], [task.thread // width, d])
    blocks.synchronise()
    with own_columns(task.head_dim, task.thread) as (_, d):
        total = parts[0, d]
        for part in range(1, task.parts):
            total = total + parts[part, d]
        T.buffer_store(task.out, total / running[1], [task.token, task.head * task.head_dim + d])
