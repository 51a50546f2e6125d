"""Operators that have kernels of our own: linear layers, embedding, gelu and tanh."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from engram_compilers.forward_pass import Converters, ForwardPass
from engram_compilers.kernels.float_linear import float_dtype
from engram_compilers.kernels.quantise import MOST_PLANES
from engram_compilers.onnx_model import Node, Weight
from engram_compilers.signatures import planes_of
from engram_compilers.standard_converters import take
from engram_compilers.values import (
    Activation,
    ChannelScales,
    Half,
    HalfGelu,
    Rows,
    TransposedWeight,
    TwoLevelScales,
    Value,
)
from engram_runtime.errors import CompileError

BLOCK = 32  # weights of a block of MatMulNBits


def matmul_nbits(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a quantised linear layer; its scales say which format the weight has."""
    x, codes, planes = forward.rows(node, 0), forward.get(node.inputs[1]), planes_of(node)
    outputs, columns, bits = (node.attributes[name] for name in ("N", "K", "bits"))
    if not isinstance(codes, Weight) or codes.shape != (outputs, columns // BLOCK, BLOCK * bits // 8):
        raise CompileError(
            f"{node.operator} by {node.inputs[1]} is no linear layer of {outputs} x {columns} at {bits} bits"
        )
    zeros = forward.get(node.inputs[3]) if node.has(3) else None
    match bits, zeros, forward.get(node.inputs[2]):
        case 8, None, ChannelScales(scale=scale):
            return [_linear_int8(forward, x, codes, scale, planes)]
        case 4, Weight(), TwoLevelScales() as scales:
            return [_linear_int4(forward, x, codes, scales, zeros, planes)]
        case _, None, Weight() as block_scale if planes == MOST_PLANES:
            return [_linear_block(forward, x, codes, block_scale, bits)]
        case _, _, scales:
            raise CompileError(
                f"{node.operator} of {codes.name} has {bits} bits, {'no ' if zeros is None else ''}zero points and "
                f"{type(scales).__name__} for {planes} planes of activations, which is no known format"
            )


def _linear_int8(forward: ForwardPass, x: Rows, codes: Weight, scale: Weight, planes: int) -> Activation:
    (rows, columns), outputs = x.shape, codes.shape[0]
    family = forward.kernels.family
    kernel = forward.kernels.get(
        f"linear_int8_{rows}_{outputs}_{columns}_{planes}",
        lambda: family.linear_int8(rows, outputs, columns, planes),
    )
    weight = forward.packed_weight(codes, lambda: _pack_int8(forward, codes))
    channel_scale = _flat_scale(forward, scale)
    return forward.call(kernel, [*forward.quantised(x, planes), *weight, *channel_scale], (rows, outputs))


def _linear_int4(
    forward: ForwardPass, x: Rows, codes: Weight, scales: TwoLevelScales, zeros: Weight, planes: int
) -> Activation:
    (rows, columns), outputs = x.shape, codes.shape[0]
    family = forward.kernels.family
    kernel = forward.kernels.get(
        f"linear_int4_{rows}_{outputs}_{columns}_{planes}",
        lambda: family.linear_int4(rows, outputs, columns, planes),
    )

    def pack() -> Mapping[str, NDArray[Any]]:
        zero = unpack_nibbles(forward.model.read(zeros))[:, : columns // BLOCK]
        packed: Mapping[str, NDArray[Any]] = family.pack_int4(
            unpack_nibbles(forward.model.read(codes)).reshape(outputs, columns),
            forward.model.read(scales.multiplier),
            zero,
        )
        return packed

    weight = forward.packed_weight(codes, pack)
    channel_scale = _flat_scale(forward, scales.scale)
    return forward.call(kernel, [*forward.quantised(x, planes), *weight, *channel_scale], (rows, outputs))


def _linear_block(forward: ForwardPass, x: Rows, codes: Weight, block_scale: Weight, bits: int) -> Activation:
    (rows, columns), outputs = x.shape, codes.shape[0]
    family = forward.kernels.family
    kernel = forward.kernels.get(
        f"linear_block{bits}_{rows}_{outputs}_{columns}", lambda: family.linear_block(rows, outputs, columns, bits)
    )

    def pack() -> Mapping[str, NDArray[Any]]:
        stored = forward.model.read(codes)
        values = stored if bits == 8 else unpack_nibbles(stored)
        packed: Mapping[str, NDArray[Any]] = family.pack_block(
            values.reshape(outputs, columns), forward.model.read(block_scale), bits
        )
        return packed

    planes, row_scale, *_ = forward.quantised(x, MOST_PLANES)
    return forward.call(kernel, [planes, row_scale, *forward.packed_weight(codes, pack)], (rows, outputs))


def gather_block_quantized(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower an int8 embedding; a tied head shares its packed weight."""
    codes, ids, scales = (forward.get(name) for name in node.inputs)
    if not (isinstance(codes, Weight) and isinstance(ids, Activation) and isinstance(scales, ChannelScales)):
        raise CompileError(f"{node.operator} of {node.inputs[0]} is not an int8 table with a scale per row")
    (tokens,), (vocabulary, blocks, block) = ids.shape, codes.shape
    kernel = forward.kernels.get(
        f"embed_int8_{tokens}_{vocabulary}_{blocks * block}",
        lambda: forward.kernels.family.embed_int8(tokens, vocabulary, blocks * block),
    )
    weight = forward.packed_weight(codes, lambda: _pack_int8(forward, codes))
    rows = forward.call(kernel, [ids.expr, *weight, *_flat_scale(forward, scales.scale)], (tokens, blocks * block))
    return [forward.reshape(rows, (tokens, blocks, block))]


def matmul(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a float linear layer written as a product with a transposed weight, or a small product per token."""
    if isinstance(forward.get(node.inputs[1]), Activation):
        return [_batched_matmul(forward, node)]
    x, weight = forward.activation(node, 0), forward.get(node.inputs[1])
    if not isinstance(weight, TransposedWeight) or len(x.shape) != 2:
        raise CompileError(f"{node.operator} by {node.inputs[1]} is not a linear layer")
    return [_linear_float(forward, x, weight.weight)]


def _batched_matmul(forward: ForwardPass, node: Node) -> Activation:
    a, b = forward.activation(node, 0), forward.activation(node, 1)
    if not len(a.shape) == len(b.shape) == 3 or a.shape[0] != b.shape[0]:
        raise CompileError(f"{node.operator} of {a.shape} and {b.shape} is not a product per token")
    sizes = (*a.shape, b.shape[2])
    kernel = forward.kernels.get(
        f"batched_matmul_{'_'.join(map(str, sizes))}",
        lambda: forward.kernels.shared.batched_matmul.batched_matmul(*sizes),
    )
    return forward.call(kernel, [a.expr, b.expr], (*a.shape[:2], b.shape[2]))


def gelu(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower gelu by tanh, put off where it may become part of a gated feed-forward."""
    value = forward.get(node.inputs[0])
    return [HalfGelu(value)] if isinstance(value, Half) else [forward.gelu(forward.activation(node, 0))]


def tanh(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower tanh."""
    return [forward.tanh(forward.activation(node, 0))]


def gemm(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a float linear layer written as ``x @ weight.T``, which is what torch makes of it."""
    x, weight = forward.activation(node, 0), forward.get(node.inputs[1])
    if not isinstance(weight, Weight):
        raise CompileError(f"{node.operator} by {node.inputs[1]} is not a linear layer")
    return [_linear_float(forward, x, weight)]


def _linear_float(forward: ForwardPass, x: Activation, weight: Weight) -> Activation:
    (rows, columns), outputs = x.shape, weight.shape[0]
    packed, dtype = _packed_float(forward, weight)
    kernel = forward.kernels.get(
        f"linear_float_{rows}_{outputs}_{columns}_{dtype}",
        lambda: forward.kernels.shared.float_linear.linear_float(rows, outputs, columns, dtype),
    )
    return forward.call(kernel, [x.expr, packed], (rows, outputs))


def gather(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a float embedding, which shares its packed weight with a tied head, or rows of a weight; or `take`."""
    weight, ids = (forward.get(name) for name in node.inputs)
    if isinstance(weight, Weight) and isinstance(ids, Weight) and node.attributes.get("axis", 0) == 0:
        return [weight.rows(ids)]
    if not isinstance(weight, Weight) or len(weight.shape) != 2 or weight.dtype != "float32":
        return take(forward, node)
    if node.attributes.get("axis", 0) != 0 or not isinstance(ids, Activation) or len(ids.shape) != 1:
        return take(forward, node)
    (tokens,), (vocabulary, columns) = ids.shape, weight.shape
    packed, dtype = _packed_float(forward, weight)
    kernel = forward.kernels.get(
        f"embed_float_{tokens}_{vocabulary}_{columns}_{dtype}",
        lambda: forward.kernels.shared.float_linear.embed_float(tokens, vocabulary, columns, dtype),
    )
    return [forward.call(kernel, [ids.expr, packed], (tokens, columns))]


def _packed_float(forward: ForwardPass, weight: Weight) -> tuple[relax.Var, str]:
    """Return a float weight as kernels read it, and the dtype it has there."""

    def pack() -> Mapping[str, NDArray[Any]]:
        values = forward.model.read(weight)
        packed: Mapping[str, NDArray[Any]] = forward.kernels.shared.float_linear.pack_float(values, float_dtype(values))
        return packed

    (packed,) = forward.packed_weight(weight, pack)
    return packed, dtype_of(packed)


def dtype_of(packed: relax.Var) -> str:
    """Return the dtype a weight is packed in."""
    return str(packed.ty.dtype.dtype)


def _pack_int8(forward: ForwardPass, codes: Weight) -> Mapping[str, NDArray[Any]]:
    weight = forward.model.read(codes).reshape(codes.shape[0], -1)
    packed: Mapping[str, NDArray[Any]] = forward.kernels.family.pack_int8(weight)
    return packed


def _flat_scale(forward: ForwardPass, scale: Weight) -> list[relax.Var]:
    return forward.arguments.of(scale.name, lambda: {"flat": forward.model.read(scale).reshape(-1)})


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Split bytes into 4-bit codes along the last axis, the low half first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


KERNEL_CONVERTERS: Converters = {
    "Gather": gather,
    "Gelu": gelu,
    "Gemm": gemm,
    "MatMul": matmul,
    "Tanh": tanh,
    "com.microsoft.GatherBlockQuantized": gather_block_quantized,
    "com.microsoft.MatMulNBits": matmul_nbits,
}
