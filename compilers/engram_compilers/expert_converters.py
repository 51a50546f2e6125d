"""Mixtures of experts: MoE and QMoE as a router, two linear layers over the chosen experts, and the weighted sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax, tirx

from engram_compilers.forward_pass import Converters, ExpertRead, ForwardPass
from engram_compilers.kernel_converters import dtype_of, unpack_nibbles
from engram_compilers.kernels.experts import Routing
from engram_compilers.kernels.float_linear import float_dtype
from engram_compilers.onnx_model import Node, Weight
from engram_compilers.values import Activation, ChannelScales, Gated, Rows, Softmax, TwoLevelScales, Value
from engram_runtime.errors import CompileError

GATE_AND_UP, ALONE = 2, 1  # parts of a layer's outputs, of which the graph stores a row each in turn
ROUTER_WEIGHTS = 14

Order = NDArray[np.int64]  # of a weight's rows


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayer:
    """One linear layer of all experts.

    shape: E, N and K.
    pack: (expert, rows) -> one expert's weight as the kernel reads it, its rows in that order.
    make_kernel: (dtype of the packed weight, routing, rows of x, N, K) -> kernel.
    operands: x -> what the kernel takes of it.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    pack: Callable[[int, Order], Mapping[str, NDArray[Any]]]
    make_kernel: Callable[[str, Routing, int, int, int], tirx.PrimFunc]
    operands: Callable[[Rows], list[relax.Expr]]


def moe(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a mixture of float experts."""
    normalise = bool(node.attributes["normalize_routing_weights"])
    return [_mix(forward, node, *(_float_layer(forward, node, index) for index in (2, 4)), normalise=normalise)]


def unnormalised_moe(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a mixture of float experts whose weights are not divided by their sum."""
    return [_mix(forward, node, *(_float_layer(forward, node, index) for index in (2, 3)), normalise=False)]


def qmoe(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a mixture of quantised experts; the scales say which format a weight has."""
    router_weights = forward.get(node.inputs[ROUTER_WEIGHTS])
    if not isinstance(router_weights, Softmax) or router_weights.whole is not forward.activation(node, 1):
        raise CompileError(f"{node.operator} does not weigh experts by the softmax of its router's logits")
    layers = (_quantised_layer(forward, node, *indices) for indices in ((2, 3, 11), (5, 6, 12)))
    return [_mix(forward, node, *layers, normalise=bool(node.attributes["normalize_routing_weights"]))]


def _float_layer(forward: ForwardPass, node: Node, index: int) -> ExpertLayer:
    weight = _weight(forward, node, index)
    count, outputs, inputs = weight.shape
    kernels = forward.kernels.shared
    dtype = cache(lambda: float_dtype(forward.model.read(weight)))  # one for all experts, only known by reading them
    return ExpertLayer(
        name=weight.name,
        kind="float",
        shape=(count, outputs, inputs),
        pack=lambda expert, rows: kernels.float_linear.pack_float(forward.model.read(weight)[expert][rows], dtype()),
        make_kernel=lambda dtype, routing, rows, n, k: kernels.experts.expert_linear_float(routing, rows, n, k, dtype),
        operands=lambda x: [forward.materialise(x).expr],
    )


def _quantised_layer(forward: ForwardPass, node: Node, codes: int, scales: int, zeros: int) -> ExpertLayer:
    weight = _weight(forward, node, codes)
    match node.attributes["expert_weight_bits"], node.has(zeros), forward.get(node.inputs[scales]):
        case 8, False, ChannelScales(scale=scale) | (Weight(shape=(_, _, 1)) as scale):
            return _int8_layer(forward, weight, scale)
        case 4, True, TwoLevelScales() as two_level:
            return _int4_layer(forward, weight, two_level, _weight(forward, node, zeros))
        case bits, has_zeros, other:
            raise CompileError(
                f"{node.operator} of {weight.name} has {bits} bits, {'zero' if has_zeros else 'no zero'} points and "
                f"{type(other).__name__}, which is no known format"
            )


def _int8_layer(forward: ForwardPass, codes: Weight, scale: Weight) -> ExpertLayer:
    family, read = forward.kernels.expert_family, forward.model.read
    count, outputs, inputs = codes.shape

    def pack(expert: int, rows: Order) -> Mapping[str, NDArray[Any]]:
        packed: Mapping[str, NDArray[Any]] = family.pack_expert_int8(
            read(codes)[expert][rows], read(scale)[expert][rows, 0]
        )
        return packed

    shape = (count, outputs, inputs)
    return ExpertLayer(
        codes.name, "int8", shape, pack, lambda _, *sizes: family.expert_linear_int8(*sizes), _two_planes(forward)
    )


def _int4_layer(forward: ForwardPass, codes: Weight, scales: TwoLevelScales, zeros: Weight) -> ExpertLayer:
    family, read = forward.kernels.expert_family, forward.model.read
    count, outputs, half_inputs = codes.shape

    def pack(expert: int, rows: Order) -> Mapping[str, NDArray[Any]]:
        multiplier = read(scales.multiplier)[expert][rows]
        zero = unpack_nibbles(read(zeros)[expert][rows])[:, : multiplier.shape[1]]
        packed: Mapping[str, NDArray[Any]] = family.pack_expert_int4(
            unpack_nibbles(read(codes)[expert][rows]), multiplier, zero, read(scales.scale)[expert][rows, 0]
        )
        return packed

    shape = (count, outputs, 2 * half_inputs)
    return ExpertLayer(
        codes.name, "int4", shape, pack, lambda _, *sizes: family.expert_linear_int4(*sizes), _two_planes(forward)
    )


def _two_planes(forward: ForwardPass) -> Callable[[Rows], list[relax.Expr]]:
    return lambda x: forward.quantised(x, 2)


def _mix(forward: ForwardPass, node: Node, gate_up: ExpertLayer, down: ExpertLayer, *, normalise: bool) -> Activation:
    x, logits = forward.rows(node, 0), forward.activation(node, 1)
    routing = Routing(x.shape[0], gate_up.shape[0], node.attributes["k"])
    *segments, weight = _route(forward, logits, routing, normalise=normalise)
    hidden = Gated(_linear(forward, gate_up, x, routing, segments, GATE_AND_UP), "silu")
    y = _linear(forward, down, hidden, routing, segments, ALONE)
    expert_bytes = sum(forward.arguments.bytes_of(_packed_name(layer)) // routing.experts for layer in (gate_up, down))
    forward.expert_reads.append(ExpertRead(segments[-1], expert_bytes))
    experts = forward.kernels.shared.experts
    kernel = forward.kernels.get(f"combine_{routing.name}_{x.shape[1]}", lambda: experts.combine(routing, x.shape[1]))
    return forward.call(kernel, [y.expr, weight], x.shape)


def _route(forward: ForwardPass, logits: Activation, routing: Routing, *, normalise: bool) -> list[relax.Expr]:
    """Return the buffers of `experts.Segments` and the pairs' weights."""
    kernel = forward.kernels.get(
        f"route_{routing.name}_{int(normalise)}",
        lambda: forward.kernels.shared.experts.route(routing, normalise=normalise),
    )
    places, bounds = (routing.pairs,), (routing.segments + 1,)
    types = [relax.TensorType(shape, "int32") for shape in (places, bounds, bounds, (1,))]
    types.append(relax.TensorType((routing.tokens, routing.top_k), "float32"))
    builder = forward.kernels.builder
    results = builder.emit(relax.call_tir(kernel, [logits.expr], out_ty=types))
    return [builder.emit(results[index]) for index in range(len(types))]


def _linear(
    forward: ForwardPass,
    layer: ExpertLayer,
    x: Rows,
    routing: Routing,
    segments: Sequence[relax.Expr],
    parts: int,
) -> Activation:
    """Apply the chosen experts' layer; the parts of its outputs come one after the other."""
    count, outputs, inputs = layer.shape
    rows = np.arange(outputs).reshape(-1, parts).T.reshape(-1)
    weight = forward.arguments.of_slices(_packed_name(layer), count, lambda expert: layer.pack(expert, rows))
    dtype = dtype_of(weight[0])
    kernel = forward.kernels.get(
        f"expert_linear_{layer.kind}_{dtype}_{routing.name}_{x.shape[0]}_{outputs}_{inputs}",
        lambda: layer.make_kernel(dtype, routing, x.shape[0], outputs, inputs),
    )
    return forward.call(kernel, [*layer.operands(x), *segments, *weight], (routing.pairs, outputs))


def _packed_name(layer: ExpertLayer) -> str:
    return f"{layer.name}:packed"


def _weight(forward: ForwardPass, node: Node, index: int) -> Weight:
    value = forward.get(node.inputs[index])
    if not isinstance(value, Weight) or len(value.shape) != 3:
        raise CompileError(f"input {node.inputs[index]} of {node.operator} is {value!r}, not a weight of every expert")
    return value


EXPERT_CONVERTERS: Converters = {
    "com.microsoft.MoE": moe,
    "com.microsoft.QMoE": qmoe,
    "engram.UnnormalisedMoE": unnormalised_moe,
}
