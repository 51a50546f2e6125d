"""ONNX's own operators in Relax; those on constants are computed at once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from tvm import relax

from engram_compilers.forward_pass import Converter, Converters, ForwardPass, scalar
from engram_compilers.onnx_model import Node, Weight
from engram_compilers.values import (
    Batched,
    ChannelScales,
    Gated,
    Half,
    HalfGelu,
    HalfSigmoid,
    HalfSilu,
    Normed,
    Softmax,
    Sum,
    TransposedWeight,
    TwoLevelScales,
    Value,
)
from engram_runtime.errors import CompileError


def elementwise(operator: Callable[..., relax.Expr], compute: Callable[..., NDArray[Any]]) -> Converter:
    """Make the converter of an operator that works element by element, with broadcasting."""

    def convert(forward: ForwardPass, node: Node) -> Sequence[Value]:
        values = [forward.get(name) for name in node.inputs]
        if all(isinstance(value, np.ndarray) for value in values):
            return [np.asarray(compute(*values))]
        operands = [forward.activation(node, index) for index in range(len(values))]
        shape = np.broadcast_shapes(*(operand.shape for operand in operands))
        return [forward.emit(operator(*(operand.expr for operand in operands)), shape, operands[0].dtype)]

    return convert


def mul(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Multiply; silu or gelu of a half times the other half is one kernel, multiplier * scale a weight's scales."""
    match [forward.get(name) for name in node.inputs]:
        case [Half() as half, HalfSigmoid(half=gated)] if half == gated:
            return [HalfSilu(half)]
        case [HalfSilu(half=Half(index=0) as gate), Half(index=1) as up] if gated_rows(gate, up):
            return [Gated(gate.whole, "silu")]
        case [HalfGelu(half=Half(index=0) as gate), Half(index=1) as up] if gated_rows(gate, up):
            return [Gated(gate.whole, "gelu")]
        case [Weight() as multiplier, Weight() as scale] if scale.shape == (*multiplier.shape[:-1], 1):
            return [TwoLevelScales(multiplier, scale)]
        case _:
            return elementwise(relax.op.multiply, np.multiply)(forward, node)


def gated_rows(gate: Half, up: Half) -> bool:
    """Whether these are the halves of the same float32 rows ``[M, 2F]``, which one kernel gates."""
    return gate.whole is up.whole and len(gate.whole.shape) == 2 and gate.whole.dtype == "float32"


def sigmoid(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Sigmoid, put off where it may become part of silu."""
    value = forward.get(node.inputs[0])
    if isinstance(value, Half):
        return [HalfSigmoid(value)]
    x = forward.activation(node, 0)
    return [forward.emit(relax.op.sigmoid(x.expr), x.shape)]


def softmax(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Softmax of the last axis, put off, as a mixture of experts computes it itself."""
    x = forward.activation(node, 0)
    if node.attributes.get("axis", -1) not in (-1, len(x.shape) - 1):
        raise CompileError(f"{node.operator} of axis {node.attributes['axis']} is not supported")
    return [Softmax(x)]


def split(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Split the last axis; two equal halves are put off."""
    x = forward.activation(node, 0)
    if node.attributes.get("axis", 0) not in (-1, len(x.shape) - 1):
        raise CompileError(f"{node.operator} of axis {node.attributes.get('axis')} is not supported")
    if not node.has(1):
        if len(node.outputs) != 2 or x.shape[-1] % 2:
            raise CompileError(f"{node.operator} of {x.shape} into {len(node.outputs)} parts is not supported")
        return [Half(x, 0), Half(x, 1)]
    ends = np.cumsum(constant(forward, node, 1)).tolist()
    return [
        forward.emit(relax.op.strided_slice(x.expr, [-1], [start], [end]), (*x.shape[:-1], end - start))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def cast(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Cast; a weight's multiplier stays the integers it is."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attributes["to"])
    value = forward.get(node.inputs[0])
    if isinstance(value, np.ndarray):
        return [value.astype(dtype)]
    if isinstance(value, Weight):
        return [value]
    x = forward.activation(node, 0)
    return [forward.emit(relax.op.astype(x.expr, dtype.name), x.shape, dtype.name)]


def expand(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Expand; only scales ``[N, 1]`` or ``[E, N, 1]`` over the blocks of a weight."""
    value = forward.get(node.inputs[0])
    if not isinstance(value, Weight) or value.shape[-1] != 1:
        raise CompileError(f"{node.operator} of {value!r} is not supported")
    return [ChannelScales(value)]


def unsqueeze(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Add axes of one."""
    value, axes = forward.get(node.inputs[0]), constant(forward, node, 1).tolist()
    if isinstance(value, np.ndarray):
        return [np.expand_dims(value, tuple(axes))]
    if isinstance(value, ChannelScales):
        return [value]
    x = forward.activation(node, 0)
    if axes == [0] and len(x.shape) == 2:
        return [Batched(x)]
    shape = list(x.shape)
    for axis in sorted(axis % (len(x.shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return [forward.reshape(x, shape)]


def squeeze(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Remove axes of one."""
    value = forward.get(node.inputs[0])
    axes = constant(forward, node, 1).tolist() if node.has(1) else None
    if isinstance(value, np.ndarray):
        return [np.squeeze(value, None if axes is None else tuple(axes))]
    if isinstance(value, Batched) and axes == [0]:
        return [value.inner]
    x = forward.activation(node, 0)
    gone = [axis % len(x.shape) for axis in axes] if axes is not None else [i for i, n in enumerate(x.shape) if n == 1]
    return [forward.reshape(x, [size for axis, size in enumerate(x.shape) if axis not in gone])]


def reshape(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Reshape to a constant shape with at most one -1."""
    shape = constant(forward, node, 1).tolist()
    value = forward.get(node.inputs[0])
    if isinstance(value, np.ndarray):
        return [value.reshape(shape)]
    if isinstance(value, Weight) and len(value.shape) == len(shape) == 1:  # a list of ids, as index_select wants it
        return [value]
    x = forward.activation(node, 0)
    if -1 in shape:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = int(np.prod(x.shape)) // known
    return [forward.reshape(x, shape)]


def shape(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Return the shape, known since the number of tokens is."""
    begin, end = node.attributes.get("start", 0), node.attributes.get("end")
    return [np.array(forward.activation(node, 0).shape[begin:end], dtype=np.int64)]


def take(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Take entries of an axis by index."""
    axis = node.attributes.get("axis", 0)
    value, indices = (forward.get(name) for name in node.inputs)
    if isinstance(value, np.ndarray) and isinstance(indices, np.ndarray):
        return [np.asarray(np.take(value, indices, axis=axis))]
    x, wanted = forward.activation(node, 0), forward.activation(node, 1)
    axis %= len(x.shape)
    result = (*x.shape[:axis], *wanted.shape, *x.shape[axis + 1 :])
    return [forward.emit(relax.op.take(x.expr, wanted.expr, axis=axis, mode="clip"), result, x.dtype)]


def less(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Compare element by element."""
    x, y = forward.activation(node, 0), forward.activation(node, 1)
    return [forward.emit(relax.op.less(x.expr, y.expr), np.broadcast_shapes(x.shape, y.shape), "bool")]


def where(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Choose element by element."""
    chooser, x, y = (forward.activation(node, index) for index in range(3))
    shape = np.broadcast_shapes(chooser.shape, x.shape, y.shape)
    return [forward.emit(relax.op.where(chooser.expr, x.expr, y.expr), shape, x.dtype)]


def concat(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Join along an axis."""
    values = [forward.get(name) for name in node.inputs]
    axis = node.attributes["axis"]
    if all(isinstance(value, np.ndarray) for value in values):
        return [np.concatenate(values, axis=axis)]  # type: ignore[arg-type]
    parts = [forward.activation(node, index) for index in range(len(values))]
    joined = list(parts[0].shape)
    joined[axis] = sum(part.shape[axis] for part in parts)
    return [forward.emit(relax.op.concat([part.expr for part in parts], axis), joined)]


def slice_(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Take a range of each given axis."""
    value = forward.get(node.inputs[0])
    starts, ends, axes, steps = (
        constant(forward, node, index).tolist() if node.has(index) else None for index in (1, 2, 3, 4)
    )
    whole = value.shape if isinstance(value, np.ndarray) else forward.activation(node, 0).shape
    axes = list(range(len(starts or []))) if axes is None else axes
    ranges = {
        axis % len(whole): slice(start, end, step)
        for axis, start, end, step in zip(axes, starts or [], ends or [], steps or [1] * len(axes), strict=True)
    }
    if isinstance(value, np.ndarray):
        return [value[tuple(ranges.get(axis, slice(None)) for axis in range(len(whole)))]]
    bounds = {axis: part.indices(whole[axis]) for axis, part in ranges.items()}
    begin, end, stride = ([bound[part] for bound in bounds.values()] for part in range(3))
    result = [len(range(*bounds[axis])) if axis in bounds else size for axis, size in enumerate(whole)]
    x = forward.activation(node, 0)
    return [forward.emit(relax.op.strided_slice(x.expr, list(bounds), begin, end, stride), result, x.dtype)]


def transpose(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Swap axes; a weight only changes how it is seen."""
    order = list(node.attributes["perm"])
    value = forward.get(node.inputs[0])
    if isinstance(value, Weight) and order == [1, 0]:
        return [TransposedWeight(value)]
    x = forward.activation(node, 0)
    return [forward.emit(relax.op.permute_dims(x.expr, order), [x.shape[axis] for axis in order], x.dtype)]


def clip(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Clip to constant bounds."""
    x = forward.activation(node, 0)
    bounds = [float(scalar(constant(forward, node, i))) if node.has(i) else None for i in (1, 2)]
    low, high = (relax.const(bound, "float32") if bound is not None else None for bound in bounds)
    expr = x.expr
    expr = expr if low is None else relax.op.maximum(expr, low)
    expr = expr if high is None else relax.op.minimum(expr, high)
    return [forward.emit(expr, x.shape)]


def rms_normalization(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Normalise the last axis; of rows it is put off, as quantising them may be part of it."""
    x, gain = forward.rows(node, 0), forward.activation(node, 1)
    if node.attributes.get("axis", -1) not in (-1, len(x.shape) - 1):
        raise CompileError(f"{node.operator} of axis {node.attributes['axis']} is not supported")
    eps = node.attributes.get("epsilon", 1e-5)
    if len(x.shape) != 2:
        return [forward.rms_norm(forward.materialise(x), gain, eps)]
    return [Normed(x if isinstance(x, Sum) else forward.materialise(x), gain, eps)]


def constant(forward: ForwardPass, node: Node, index: int) -> NDArray[Any]:
    """Return an input that is known at compile time."""
    value = forward.get(node.inputs[index])
    if not isinstance(value, np.ndarray):
        raise CompileError(f"input {node.inputs[index]} of {node.operator} is not known at compile time")
    return value


STANDARD_CONVERTERS: Converters = {
    "Abs": elementwise(relax.op.abs, np.abs),
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Div": elementwise(relax.op.divide, np.divide),
    "Expand": expand,
    "Less": less,
    "Mul": mul,
    "RMSNormalization": rms_normalization,
    "Relu": elementwise(relax.op.nn.relu, lambda x: np.maximum(x, 0)),
    "Reshape": reshape,
    "Shape": shape,
    "Sigmoid": sigmoid,
    "Sign": elementwise(relax.op.sign, np.sign),
    "Slice": slice_,
    "Softmax": softmax,
    "Split": split,
    "Sqrt": elementwise(relax.op.sqrt, np.sqrt),
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Where": where,
}
