"""Operators on several residual streams, and the gates around linear attention."""

from collections.abc import Sequence

import numpy as np
from tvm import relax

from engram_compilers.forward_pass import Converters, ForwardPass
from engram_compilers.onnx_model import Node, Weight
from engram_compilers.values import Activation, Batched, Value
from engram_runtime.errors import CompileError

GATE_ACTIVATIONS = {"silu": relax.op.nn.silu, "sigmoid": relax.op.sigmoid}


def branchwise_rms_norm(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower the norm of each stream."""
    x, branches = forward.activation(node, 0), node.attributes["num_branches"]
    gain = forward.activation(node, 1) if node.has(1) else None
    return [forward.branch_norm(x, gain, node.attributes["epsilon"], branches)]


def pre_mix(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower the weighted sum over streams, a weight for every feature."""
    x, mix = forward.activation(node, 0), forward.activation(node, 1)
    branches, scale = node.attributes["num_branches"], node.attributes["reduction_scale"]
    rows, width = x.shape
    if mix.shape != x.shape:
        raise CompileError(f"{node.operator} has weights {mix.shape} for streams {x.shape}; kernels need one a feature")
    sizes = (rows, branches, width // branches)
    name = f"pre_mix_{'_'.join(map(str, sizes))}_{scale}"
    kernel = forward.kernels.get(name, lambda: forward.kernels.shared.streams.pre_mix(*sizes, scale))
    return [forward.call(kernel, [x.expr, mix.expr], (rows, width // branches))]


def post_mix(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower the injection of a block's output into every stream."""
    x, out, inject = (forward.activation(node, index) for index in range(3))
    branches, (rows, width) = node.attributes["num_branches"], x.shape
    if inject.shape != (rows, branches):
        raise CompileError(
            f"{node.operator} has weights {inject.shape}; kernels need one for each of {branches} streams"
        )
    sizes = (rows, branches, width // branches)
    kernel = forward.kernels.get(
        f"post_mix_{'_'.join(map(str, sizes))}", lambda: forward.kernels.shared.streams.post_mix(*sizes)
    )
    return [forward.call(kernel, [x.expr, out.expr, inject.expr], x.shape)]


def engram_gate(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower the gate of an n-gram memory into every stream, and the norm of what it lets through."""
    key, query, value = (_without_batch(forward, node, index) for index in range(3))
    rows, branches, columns = key.shape
    eps = node.attributes["epsilon"]
    gains = [forward.reshape(forward.activation(node, index), (branches * columns,)) for index in (3, 4, 5)]
    flat = [forward.reshape(part, (rows, branches * columns)) for part in (key, query)]
    normed = [forward.branch_norm(part, gain, eps, branches) for part, gain in zip(flat, gains[:2], strict=True)]
    sizes = (rows, branches, columns)
    kernel = forward.kernels.get(
        f"gate_value_{'_'.join(map(str, sizes))}", lambda: forward.kernels.shared.streams.gate_value(*sizes)
    )
    gated = forward.call(kernel, [*(part.expr for part in normed), value.expr], (rows, branches * columns))
    results = (gated, forward.branch_norm(gated, gains[2], eps, branches))
    return [forward.reshape(result, (1, rows, branches, columns)) for result in results]


def gated_rms_norm(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower the norm of each head times a gate."""
    x, gain, gate = (forward.activation(node, index) for index in range(3))
    rows, width = x.shape
    heads = forward.reshape(x, (rows * width // gain.shape[0], gain.shape[0]))
    normed = forward.reshape(forward.rms_norm(heads, gain, node.attributes["epsilon"]), x.shape)
    activated = GATE_ACTIVATIONS[node.attributes["activation"].decode()](gate.expr)
    return [forward.emit(relax.op.multiply(normed.expr, activated), x.shape)]


def linear_attention_gate(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower decay = scale * softplus(a + bias) and rate = sigmoid(b)."""
    decay, rate = (_without_batch(forward, node, index) for index in (0, 3))
    bias, scale = (forward.activation(node, index) for index in (1, 2))
    shifted = relax.op.add(decay.expr, bias.expr)
    # softplus(x) = max(x, 0) + log(1 + exp(-|x|)) never overflows.
    tail = relax.op.log(relax.op.add(relax.const(1.0), relax.op.exp(relax.op.negative(relax.op.abs(shifted)))))
    softplus = relax.op.add(relax.op.maximum(shifted, relax.const(0.0)), tail)
    log_decay = forward.emit(relax.op.multiply(softplus, scale.expr), decay.shape)
    return [Batched(log_decay), Batched(forward.emit(relax.op.sigmoid(rate.expr), rate.shape))]


def _without_batch(forward: ForwardPass, node: Node, index: int) -> Activation:
    """Return an input without its leading axis of one."""
    value = forward.get(node.inputs[index])
    if isinstance(value, Batched):
        return value.inner
    x = forward.activation(node, index)
    if isinstance(value, Weight | np.ndarray) or x.shape[0] != 1:
        raise CompileError(f"input {node.inputs[index]} of {node.operator} has shape {x.shape}, kernels need one batch")
    return forward.reshape(x, x.shape[1:])


STREAM_CONVERTERS: Converters = {
    "com.microsoft.BranchwiseRMSNorm": branchwise_rms_norm,
    "com.microsoft.EngramGate": engram_gate,
    "com.microsoft.GatedRMSNorm": gated_rms_norm,
    "com.microsoft.HyperConnectionPostMix": post_mix,
    "com.microsoft.HyperConnectionPreMix": pre_mix,
    "com.microsoft.LinearAttentionGate": linear_attention_gate,
}
