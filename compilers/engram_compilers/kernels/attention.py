# mypy: disable-error-code="valid-type, untyped-decorator"
"""The key/value cache, and causal attention over it.

Caches are float32 or float16 ``[1, Hkv, S, hd]``: S is the capacity, row p of a head holds position p. A float16 cache
holds each key and value rounded once, what is beyond its largest number as that; attention computes in float32 on
either. Query head h reads key/value head h // (H / Hkv); hd is a multiple of 16. Positions must be valid
(position + T <= S): the runtime checks them.
"""

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.attention_shape import AttentionShape, Operands, live_words
from engram_compilers.kernels.intrinsics import Expr, converted, lanes
from engram_compilers.kernels.loops import LANES, loop_over
from engram_compilers.kernels.online_softmax import attend_all
from engram_compilers.kernels.packing import require_indexable
from engram_compilers.kernels.rotary import ROTATED_PER_US, rotate
from engram_runtime.errors import CompileError


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

    ``(qkv f32 [T, (H + 2*Hkv) * hd], cos f32 [S, rotary_dim/2], sin f32 [S, rotary_dim/2], position i64 [1],
    k_cache [1, Hkv, S, hd], v_cache [1, Hkv, S, hd]) -> q f32 [T, H * hd]``, token t at position + t; without
    ``rotary_dim`` all of a head is rotated. The caches are changed in place, so the call is

        call_tir_inplace(gv, [qkv, cos, sin, position, k_cache, v_cache], [4, 5, -1],
                         [k_cache_type, v_cache_type, q_type])

    Rotation is that of `rotary.rotate`.
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
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * width / ROTATED_PER_US):
                append_token(qkv, token, cos, sin, T.cast(position[0], "int32") + token, k_cache, v_cache, q)

    return kernel


def append_token(
    qkv: Expr, token: Expr, cos: Expr, sin: Expr, position: Expr, k_cache: Expr, v_cache: Expr, q: Expr
) -> None:
    """Emit what `rope_append` does for one row of ``qkv`` and ``q``, at a position."""
    _, kv_heads, _, head_dim = (int(size) for size in k_cache.shape)
    heads = int(q.shape[1]) // head_dim
    row = T.Bind(position)
    with T.serial(heads) as head:
        rotate(q, [token], head * head_dim, qkv, [token], head * head_dim, cos, sin, row, head_dim)
    with T.serial(kv_heads) as head:
        rotate(k_cache, [0, head, row], 0, qkv, [token], (heads + head) * head_dim, cos, sin, row, head_dim)
        with T.serial(head_dim // LANES) as d:
            value = T.Bind(qkv[token, lanes((heads + kv_heads + head) * head_dim + d * LANES)])
            T.buffer_store(v_cache, converted(value, v_cache.dtype), [0, head, row, lanes(d * LANES)])


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

    out[t] = softmax(scale * q[t] . K) V over cache rows 0..position+t, or the last ``window`` of them. The order is
    that of `online_softmax`, the same for every T.

    Raises:
        CompileError: the window holds no token.
    """
    if window is not None and window < 1:
        raise CompileError(
            f"attention has a window of {window} tokens, kernels need at least 1; export the model again"
        )
    shape = AttentionShape(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        scale=scale,
        window=capacity if window is None else window,
    )
    require_indexable("the key cache", kv_heads, capacity, head_dim)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        q: T.Buffer((tokens, heads * head_dim), "float32"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        position: T.Buffer((1,), "int64"),
        out: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            attend_all(shape, Operands(q=q, k_cache=k_cache, v_cache=v_cache, position=position, live=None, out=out))

    return kernel


def attend_selected(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    scale: float,
    cache_dtype: str = "float32",
) -> tirx.PrimFunc:
    """Build `attend` over the keys of ``live i32 [T, words]`` alone, an argument after the position.

    Bit i of live[t, w] stands for key 16 * w + i, as `block_selection.select_blocks` sets it. Where all bits up to
    the token's own position are set, the result has the bits of `attend`.
    """
    shape = AttentionShape(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        scale=scale,
        window=capacity,
    )
    words = live_words(capacity)
    require_indexable("the key cache", kv_heads, capacity, head_dim)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        q: T.Buffer((tokens, heads * head_dim), "float32"),
        k_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        v_cache: T.Buffer((1, kv_heads, capacity, head_dim), cache_dtype),
        position: T.Buffer((1,), "int64"),
        live: T.Buffer((tokens, words), "int32"),
        out: T.Buffer((tokens, heads * head_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            attend_all(shape, Operands(q=q, k_cache=k_cache, v_cache=v_cache, position=position, live=live, out=out))

    return kernel
