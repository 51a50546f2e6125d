"""Operators that carry a state of fixed size; their kernels change it in place."""

from collections.abc import Sequence

from engram_compilers.forward_pass import Converters, ForwardPass, scale_of, unbatched
from engram_compilers.onnx_model import Node, Weight
from engram_compilers.values import Batched, Value
from engram_runtime.errors import CompileError


def linear_attention(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower the gated delta rule with one decay and one beta per value head."""
    query, key, value, log_decay, beta = (unbatched(forward, node, index) for index in (0, 1, 2, 4, 5))
    state = forward.activation(node, 3)
    tokens, (_, heads, key_dim, value_dim) = query.shape[0], state.shape
    key_heads = node.attributes["q_num_heads"]
    found = [part.shape for part in (query, key, value, log_decay, beta)]
    narrow, wide = (tokens, key_heads * key_dim), (tokens, heads * value_dim)
    alike = node.attributes["kv_num_heads"] == heads and heads % key_heads == 0
    if not alike or found != [narrow, narrow, wide, (tokens, heads), (tokens, heads)]:
        raise CompileError(
            f"{node.operator} has {key_heads} heads and inputs {found} for a state {state.shape}; kernels need value "
            "heads in equal groups over key heads, and a decay and a beta per value head"
        )
    scale, kernels = scale_of(node), forward.kernels.shared
    sizes = (tokens, key_heads, heads, key_dim, value_dim)
    name = f"gated_delta_{'_'.join(map(str, sizes))}_{scale}"
    kernel = forward.kernels.get(name, lambda: kernels.recurrent.gated_delta(*sizes, scale))
    inputs = [part.expr for part in (query, key, value, log_decay, beta)]
    following, out = forward.call_in_place(kernel, inputs, [state], [value.shape])
    return [Batched(out), following]


def causal_conv_with_state(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a depthwise causal convolution, channels last and without a bias."""
    x, window = unbatched(forward, node, 0), unbatched(forward, node, 3)
    weight, name = forward.get(node.inputs[1]), node.attributes["activation"].decode()
    if not isinstance(weight, Weight):
        raise CompileError(f"{node.operator} by {node.inputs[1]} is not supported; kernels need a stored weight")
    tokens, channels = x.shape
    sizes = (tokens, channels, weight.shape[2], node.attributes["dilation"])
    kernels = forward.kernels.shared
    activate = kernels.recurrent.ACTIVATIONS[name]
    kernel = forward.kernels.get(
        f"causal_conv_{'_'.join(map(str, sizes))}_{name}", lambda: kernels.recurrent.causal_conv(*sizes, activate)
    )
    taps = forward.packed_weight(weight, lambda: {"taps": forward.model.read(weight)[:, 0].T})
    following, out = forward.call_in_place(kernel, [x.expr, *taps], [window], [x.shape])
    return [Batched(out), Batched(following)]


RECURRENT_CONVERTERS: Converters = {
    "com.microsoft.CausalConvWithState": causal_conv_with_state,
    "com.microsoft.LinearAttention": linear_attention,
}
