"""The meaning of the nodes of domain ``engram``, as ONNX functions of operators onnxruntime runs.

onnxruntime inlines a model's functions when it loads it; `engram_compilers` knows the nodes by name. Bodies hold for
states bound in place, where an output is the memory of an input: they read no row of a cache that they have written
over, and write caches only through operators that work in place, GroupQueryAttention and ScatterND.
"""

import onnx.parser
import onnx_ir as ir

DOMAIN = "engram"
DOMAIN_VERSION = 1

# An empty key and value tell GroupQueryAttention that the caches already hold this pass's tokens.
_SHARED_ATTENTION = """
<domain: "engram", opset_import: ["" : 23, "com.microsoft" : 1]>
SharedAttention <num_heads, kv_num_heads, scale, local_window_size>
(query, keys, values, position, cos, sin) => (out)
{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    kv_heads = Shape <start = 1, end = 2> (keys)
    head_dim = Shape <start = 3, end = 4> (keys)
    kv_width = Mul (kv_heads, head_dim)
    none_shape = Concat <axis = 0> (one, zero, kv_width)
    none = ConstantOfShape (none_shape)
    tokens = Shape <start = 0, end = 1> (query)
    total = Add (position, tokens)
    last = Sub (total, one)
    last_int = Cast <to = 6> (last)
    total_int = Cast <to = 6> (total)
    total_scalar = Squeeze (total_int)
    batched = Unsqueeze (query, zero)
    attended = com.microsoft.GroupQueryAttention <
        num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1,
        local_window_size: int = @local_window_size
    > (batched, none, none, keys, values, last_int, total_scalar, cos, sin)
    out = Squeeze (attended, zero)
}
"""

_INDEXED_ATTENTION = """
<domain: "engram", opset_import: ["" : 23, "com.microsoft" : 1]>
IndexedAttention <num_heads, kv_num_heads, scale, index_heads, rotary_dim, budget, block, epsilon>
(qkv, index_qk, query_gain, key_gain, key_cache, value_cache, index_cache, position, cos, sin)
=> (out, keys, values, index)
{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    minus_one = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    zero_scalar = Constant <value_int = 0> ()
    one_scalar = Constant <value_int = 1> ()
    block_scalar = Constant <value_int: int = @block> ()
    block = Unsqueeze (block_scalar, zero)
    tokens = Shape <start = 0, end = 1> (qkv)
    total = Add (position, tokens)
    position_scalar = Squeeze (position)
    total_scalar = Squeeze (total)
    positions = Range (position_scalar, total_scalar, one_scalar)
    nexts = Add (positions, one)

    index_dim = Shape (key_gain)
    index_shape = Concat <axis = 0> (zero, minus_one, index_dim)
    index_heads = Reshape (index_qk, index_shape)
    raw_query = Slice (index_heads, zero, minus_one, one)
    raw_key = Slice (index_heads, minus_one, end, one)
    normed_query = RMSNormalization <axis = -1, epsilon: float = @epsilon> (raw_query, query_gain)
    query_shape = Shape (normed_query)
    flat_shape = Concat <axis = 0> (one, tokens, minus_one)
    flat_query = Reshape (normed_query, flat_shape)
    position_ids = Unsqueeze (positions, zero)
    rotated_query = RotaryEmbedding <
        num_heads: int = @index_heads, rotary_embedding_dim: int = @rotary_dim
    > (flat_query, cos, sin, position_ids)
    index_query = Reshape (rotated_query, query_shape)

    first_block = Div (position, block)
    first = Mul (first_block, block)
    earlier = Slice (index_cache, first, position, two)
    new_shape = Concat <axis = 0> (one, one, minus_one, index_dim)
    new = Reshape (raw_key, new_shape)
    known = Concat <axis = 2> (earlier, new)
    known_count = Sub (total, first)
    known_end = Add (known_count, block)
    known_last = Sub (known_end, one)
    touched = Div (known_last, block)
    touched_tokens = Mul (touched, block)
    missing = Sub (touched_tokens, known_count)
    pads = Concat <axis = 0> (zero, missing)
    padded = Pad (known, pads, , two)
    block_shape = Concat <axis = 0> (touched, block, index_dim)
    by_block = Reshape (padded, block_shape)
    means = ReduceMean <keepdims = 0> (by_block, one)
    normed_means = RMSNormalization <axis = -1, epsilon: float = @epsilon> (means, key_gain)
    batched_means = Unsqueeze (normed_means, zero)
    touched_end = Add (first, touched_tokens)
    first_scalar = Squeeze (first)
    touched_end_scalar = Squeeze (touched_end)
    starts = Range (first_scalar, touched_end_scalar, block_scalar)
    start_ids = Unsqueeze (starts, zero)
    touched_keys = RotaryEmbedding <
        num_heads = 1, rotary_embedding_dim: int = @rotary_dim
    > (batched_means, cos, sin, start_ids)

    distance = Sub (positions, first)
    touched_block = Div (distance, block)
    key_of_block = Gather <axis = 1> (touched_keys, touched_block)
    place_in_block = Mod (nexts, block)
    completes = Equal (place_in_block, zero)
    completes_column = Unsqueeze (completes, one)
    raw_rows = Squeeze (raw_key, one)
    block_rows = Squeeze (key_of_block, zero)
    rows = Where (completes_column, block_rows, raw_rows)
    position_column = Unsqueeze (positions, one)
    place_pads = Concat <axis = 0> (two, zero)
    places = Pad (position_column, place_pads, , one)
    index = ScatterND (index_cache, places, rows)

    block_last = Sub (block, one)
    stored_keys = Slice (index, block_last, total, two, block)
    leading = Constant <value_ints = [0, 1]> ()
    block_keys = Squeeze (stored_keys, leading)
    transposed_keys = Transpose <perm = [1, 0]> (block_keys)
    head_scores = MatMul (index_query, transposed_keys)
    positive = Relu (head_scores)
    all_scores = ReduceSum <keepdims = 0> (positive, one)
    block_count = Div (total, block)
    block_count_scalar = Squeeze (block_count)
    blocks = Range (zero_scalar, block_count_scalar, one_scalar)
    complete = Div (nexts, block)
    complete_column = Unsqueeze (complete, one)
    unfinished = GreaterOrEqual (blocks, complete_column)
    never = Constant <value = float {-inf}> ()
    scores = Where (unfinished, never, all_scores)
    budget = Constant <value_int: int = @budget> ()
    most = Div (budget, block)
    count = Min (most, block_count)
    best_scores, best = TopK (scores, count)

    open = Constant <value = float {0}> ()
    shut = Constant <value = float {-3.4028234663852886e38}> ()
    unselected = Where (unfinished, open, shut)
    best_shape = Shape (best)
    opened = ConstantOfShape (best_shape)
    block_bias = ScatterElements <axis = 1> (unselected, best, opened)
    tail_pads = Concat <axis = 0> (zero, one)
    tail_bias = Pad (block_bias, tail_pads, , one)
    every = Range (zero_scalar, total_scalar, one_scalar)
    block_of = Div (every, block)
    token_bias = Gather <axis = 1> (tail_bias, block_of)
    bias = Unsqueeze (token_bias, leading)

    last = Sub (total, one)
    last_int = Cast <to = 6> (last)
    total_int = Cast <to = 6> (total_scalar)
    batched = Unsqueeze (qkv, zero)
    attended, keys, values = com.microsoft.GroupQueryAttention <
        num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1
    > (batched, , , key_cache, value_cache, last_int, total_int, cos, sin, , bias)
    out = Squeeze (attended, zero)
}
"""

# onnxruntime 1.31 may give MoE's result the memory of x, which the kernel clears before it reads it where it does not
# normalise. So it normalises, and the sum it divided by is put back.
_UNNORMALISED_MOE = """
<domain: "engram", opset_import: ["" : 23, "com.microsoft" : 1]>
UnnormalisedMoE <k> (x, router_logits, gate_up, down) => (out)
{
    minus_one = Constant <value_ints = [-1]> ()
    zero = Constant <value_ints = [0]> ()
    mixed = com.microsoft.MoE <
        k: int = @k, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0, activation_beta = 0.0,
        normalize_routing_weights = 1
    > (x, router_logits, gate_up, , down)
    probabilities = Softmax <axis = -1> (router_logits)
    count_scalar = Constant <value_int: int = @k> ()
    count = Unsqueeze (count_scalar, zero)
    best, places = TopK (probabilities, count)
    share = ReduceSum <keepdims = 1> (best, minus_one)
    out = Mul (mixed, share)
}
"""

_FUNCTIONS = {
    "IndexedAttention": _INDEXED_ATTENTION,
    "SharedAttention": _SHARED_ATTENTION,
    "UnnormalisedMoE": _UNNORMALISED_MOE,
}


def add_functions(model: ir.Model) -> None:
    """Add the functions of the ``engram`` nodes a graph has; call it after optimising, which would inline them."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(used):
        function = ir.serde.deserialize_function(onnx.parser.parse_function(_FUNCTIONS[name]))
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports.update({DOMAIN: DOMAIN_VERSION, "com.microsoft": 1})
