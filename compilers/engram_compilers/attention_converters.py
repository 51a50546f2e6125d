"""Attention over caches: rotation, appending and attending become kernels that change the states in place."""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax

from engram_compilers.forward_pass import POSITION, Converters, ForwardPass, scale_of, unbatched
from engram_compilers.kernels import batched_attention, block_selection
from engram_compilers.kernels.attention_shape import live_words
from engram_compilers.kernels.batched_attention import Caches
from engram_compilers.kernels.loops import LANES
from engram_compilers.onnx_model import Node
from engram_compilers.values import Activation, Apart, Batched, Value
from engram_runtime.errors import CompileError

NO_WINDOW = -1
CACHE_INPUTS = {  # places of the key and the value cache an operator extends
    "com.microsoft.GroupQueryAttention": (3, 4),
    "engram.IndexedAttention": (4, 5),
}
_INDEXED_INPUTS = ("qkv", "index_qk", "query_gain", "key_gain", "keys", "values", "index", "position", "cos", "sin")


def group_query_attention(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower attention: rotate and append to the caches in place, then attend over them.

    The exported graph states its lengths as ``position + T``; the kernels take the position itself.
    """
    qkv = unbatched(forward, node, 0)
    keys, values, cos, sin = (forward.activation(node, index) for index in (3, 4, 7, 8))
    layer = _layer(node, qkv, keys)
    query, new_keys, new_values = _append(forward, layer, qkv, keys, values, cos, sin)
    out = _attend(forward, layer, node, query, new_keys, new_values)
    return [Batched(out), new_keys, new_values]


def group_query_attention_of_each(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower `group_query_attention` over a token of each of several sequences: two kernels for all of them."""
    qkv = unbatched(forward, node, 0)
    keys, values = (_of_each(forward, node, index) for index in (3, 4))
    cos, sin = (forward.activation(node, index) for index in (7, 8))
    positions = _positions(forward)
    layer = _layer(node, qkv, keys[0])
    caches, scale, window = layer.caches, scale_of(node), _window(node)
    rotary_dim = 2 * cos.shape[1]
    sizes = _joined((*layer.sizes, layer.cache_dtype))
    append = forward.kernels.get(
        f"rope_append_each_{sizes}_{rotary_dim}", lambda: batched_attention.rope_append_each(caches, rotary_dim)
    )
    inputs = [qkv.expr, cos.expr, sin.expr, positions.expr]
    *following, query = forward.call_in_place(
        append, inputs, [*keys, *values], [(layer.tokens, layer.heads * layer.head_dim)]
    )
    attend = forward.kernels.get(
        f"attend_each_{sizes}_{scale}_{window}", lambda: batched_attention.attend_each(caches, scale, window)
    )
    out = forward.call(attend, [query.expr, *(cache.expr for cache in following), positions.expr], query.shape)
    return [Batched(out), Apart(tuple(following[: len(keys)])), Apart(tuple(following[len(keys) :]))]


def _of_each(forward: ForwardPass, node: Node, index: int) -> list[Activation]:
    value = forward.get(node.inputs[index])
    caches = [cache for cache in value.of if isinstance(cache, Activation)] if isinstance(value, Apart) else []
    if not caches:
        raise CompileError(f"{node.operator} has {node.inputs[index]} in common, where each sequence has its own")
    return caches


def _positions(forward: ForwardPass) -> Activation:
    value = forward.get(POSITION)
    assert isinstance(value, Apart)
    assert value.rows is not None
    return value.rows


def shared_attention(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower attention over caches another layer has extended: rotate the queries, then attend."""
    query, keys, values, cos, sin = (forward.activation(node, index) for index in (0, 1, 2, 4, 5))
    layer = _layer(node, query, keys)
    sizes = (layer.tokens, layer.heads, layer.head_dim, 2 * cos.shape[1], layer.capacity)
    kernel = forward.kernels.get(
        f"rotate_queries_{_joined(sizes)}", lambda: forward.kernels.shared.rotary.rotate_queries(*sizes)
    )
    rotated = forward.call(kernel, [query.expr, cos.expr, sin.expr, forward.position], query.shape)
    return [_attend(forward, layer, node, rotated, keys, values)]


def indexed_attention(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower attention to the blocks an indexer selects; the indexer's cache is changed in place like the others."""
    of = {name: forward.activation(node, index) for index, name in enumerate(_INDEXED_INPUTS)}
    layer = _layer(node, of["qkv"], of["keys"])
    index_query, index = _extend_index(forward, node, layer.tokens, of)
    live = _select(forward, node, layer.tokens, index_query, index)
    query, keys, values = _append(forward, layer, of["qkv"], of["keys"], of["values"], of["cos"], of["sin"])
    options = (*layer.sizes, scale_of(node), layer.cache_dtype)
    attention = forward.kernels.shared.attention
    kernel = forward.kernels.get(f"attend_selected_{_joined(options)}", lambda: attention.attend_selected(*options))
    inputs = [query.expr, keys.expr, values.expr, forward.position, live]
    return [forward.call(kernel, inputs, query.shape), keys, values, index]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    cache_dtype: str

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes kernels are made for, in their order."""
        return (self.tokens, self.heads, self.kv_heads, self.head_dim, self.capacity)

    @property
    def caches(self) -> Caches:
        """The caches of as many sequences as there are tokens."""
        return Caches(
            sequences=self.tokens,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            capacity=self.capacity,
            dtype=self.cache_dtype,
        )


def _layer(node: Node, queries: Activation, keys: Activation) -> _Layer:
    _, kv_heads, capacity, head_dim = keys.shape
    heads = node.attributes["num_heads"]
    if node.attributes["kv_num_heads"] != kv_heads:
        raise CompileError(
            f"{node.operator} has kv_num_heads {node.attributes['kv_num_heads']} over a cache of {kv_heads} heads; "
            "export the bundle again"
        )
    if head_dim % LANES or heads % kv_heads:
        raise CompileError(
            f"attention has {heads} heads of {head_dim} dimensions over {kv_heads}, kernels need a multiple of {LANES} "
            f"dimensions and of {kv_heads} heads, and so does onnxruntime; export a model that has them"
        )
    return _Layer(
        tokens=queries.shape[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        cache_dtype=keys.dtype,
    )


def _append(
    forward: ForwardPass,
    layer: _Layer,
    qkv: Activation,
    keys: Activation,
    values: Activation,
    cos: Activation,
    sin: Activation,
) -> tuple[Activation, Activation, Activation]:
    """Return rotated queries ``[T, H * hd]`` and both caches, changed in place."""
    options = (*layer.sizes, 2 * cos.shape[1], layer.cache_dtype)
    attention = forward.kernels.shared.attention
    kernel = forward.kernels.get(f"rope_append_{_joined(options)}", lambda: attention.rope_append(*options))
    new_keys, new_values, query = forward.call_in_place(
        kernel,
        [qkv.expr, cos.expr, sin.expr, forward.position],
        [keys, values],
        [(layer.tokens, layer.heads * layer.head_dim)],
    )
    return query, new_keys, new_values


def _attend(
    forward: ForwardPass, layer: _Layer, node: Node, query: Activation, keys: Activation, values: Activation
) -> Activation:
    options = (*layer.sizes, scale_of(node), _window(node), layer.cache_dtype)
    attention = forward.kernels.shared.attention
    kernel = forward.kernels.get(f"attend_{_joined(options)}", lambda: attention.attend(*options))
    return forward.call(kernel, [query.expr, keys.expr, values.expr, forward.position], query.shape)


def _window(node: Node) -> int | None:
    window: int = node.attributes.get("local_window_size", NO_WINDOW)
    return None if window == NO_WINDOW else window


def _extend_index(
    forward: ForwardPass, node: Node, tokens: int, of: dict[str, Activation]
) -> tuple[Activation, Activation]:
    """Return index queries ``[T, Hi * hi]`` and the index cache, changed in place."""
    heads, eps, block = (node.attributes[name] for name in ("index_heads", "epsilon", "block"))
    _, _, capacity, head_dim = of["index"].shape
    rotary_dim, turn = 2 * of["cos"].shape[1], [of["cos"].expr, of["sin"].expr, forward.position]
    append = forward.kernels.get(
        f"index_append_{_joined((tokens, heads, head_dim, rotary_dim, capacity, eps))}",
        lambda: block_selection.index_append(tokens, heads, head_dim, rotary_dim, capacity, eps),
    )
    inputs = [of["index_qk"].expr, of["query_gain"].expr, *turn]
    appended, index_query = forward.call_in_place(append, inputs, [of["index"]], [(tokens, heads * head_dim)])
    pool = forward.kernels.get(
        f"pool_blocks_{_joined((tokens, head_dim, rotary_dim, capacity, block, eps))}",
        lambda: block_selection.pool_blocks(tokens, head_dim, rotary_dim, capacity, block, eps),
    )
    (pooled,) = forward.call_in_place(pool, [of["key_gain"].expr, *turn], [appended])
    return index_query, pooled


def _select(forward: ForwardPass, node: Node, tokens: int, index_query: Activation, index: Activation) -> relax.Expr:
    """Return ``live i32 [T, words]``, the keys of the blocks each token attends to."""
    heads, budget, block = (node.attributes[name] for name in ("index_heads", "budget", "block"))
    count = budget // block
    _, _, capacity, head_dim = index.shape
    score = forward.kernels.get(
        f"score_blocks_{_joined((tokens, heads, head_dim, capacity, block))}",
        lambda: block_selection.score_blocks(tokens, heads, head_dim, capacity, block),
    )
    select = forward.kernels.get(
        f"select_blocks_{_joined((tokens, capacity, block, count))}",
        lambda: block_selection.select_blocks(tokens, capacity, block, count),
    )
    builder = forward.kernels.builder
    ranks = relax.TensorType((tokens, block_selection.ranks_width(capacity, block)), "int32")
    scored = builder.emit(relax.call_tir(score, [index_query.expr, index.expr, forward.position], out_ty=ranks))
    live = relax.TensorType((tokens, live_words(capacity)), "int32")
    return builder.emit(relax.call_tir(select, [scored, forward.position], out_ty=live))


def _joined(parts: Sequence[object]) -> str:
    return "_".join(map(str, parts))


ATTENTION_CONVERTERS: Converters = {
    "com.microsoft.GroupQueryAttention": group_query_attention,
    "engram.IndexedAttention": indexed_attention,
    "engram.SharedAttention": shared_attention,
}

BATCH_CONVERTERS: Converters = {"com.microsoft.GroupQueryAttention": group_query_attention_of_each}
"""For passes over several sequences, of operators that need not be lowered once for each."""
