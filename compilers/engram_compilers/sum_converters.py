"""Operators that add: each a kernel of its own, or LLVM would round a product before its sum in one kernel only.

Where products and sums are fused, whether they become one instruction depends on the shape, and so on the number of
tokens; a row's bits must not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, te, topi

from engram_compilers.forward_pass import Converter, Converters, ForwardPass
from engram_compilers.onnx_model import Node
from engram_compilers.standard_converters import constant, elementwise
from engram_compilers.values import Rows, Sum, Value
from engram_runtime.errors import CompileError

OPAQUE = 8  # TVM's OpPatternKind of a kernel that is fused with no other


def unfused(compute: Callable[..., te.Tensor]) -> Callable[..., relax.Expr]:
    """Make an operator with a kernel of its own."""

    def operator(*operands: relax.Expr, **options: Any) -> relax.Expr:
        builder = relax.BlockBuilder.current()
        return builder.call_te(compute, *operands, **options, primfunc_attrs={"op_pattern": OPAQUE})

    return operator


def add(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Add; two activations of one shape, the residual stream, are put off, as a norm may be part of it."""
    values = [forward.get(name) for name in node.inputs]
    if all(isinstance(value, Rows) for value in values):
        a, b = (forward.activation(node, index) for index in range(2))
        if a.shape == b.shape and len(a.shape) == 2 and a.dtype == b.dtype == "float32":
            return [Sum(a, b)]
    return elementwise(unfused(topi.add), np.add)(forward, node)


def reduction(operator: Callable[..., relax.Expr]) -> Converter:
    """Make the converter of an operator over axes."""

    def convert(forward: ForwardPass, node: Node) -> Sequence[Value]:
        x = forward.activation(node, 0)
        axes = [axis % len(x.shape) for axis in constant(forward, node, 1).reshape(-1).tolist()]
        keep = bool(node.attributes.get("keepdims", 1))
        result = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keep or axis not in axes]
        return [forward.emit(operator(x.expr, axis=axes, keepdims=keep), result)]

    return convert


def _mean(x: te.Tensor, axis: Sequence[int], keepdims: bool) -> te.Tensor:
    count = math.prod(int(x.shape[i]) for i in axis)
    return topi.divide(topi.sum(x, axis, keepdims), te.const(float(count), x.dtype))


def reduce_l2(forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower the Euclidean norm over the last axis."""
    x = forward.activation(node, 0)
    axes = constant(forward, node, 1).reshape(-1).tolist()
    if axes not in ([-1], [len(x.shape) - 1]):
        raise CompileError(f"{node.operator} over axes {axes} of {x.shape} is not supported, only over the last")
    *outer, columns = x.shape
    rows = math.prod(outer)
    kernel = forward.kernels.get(
        f"l2_norm_{rows}_{columns}", lambda: forward.kernels.shared.normalise.l2_norm(rows, columns)
    )
    norms = forward.call(kernel, [forward.reshape(x, (rows, columns)).expr], (rows,))
    return [forward.reshape(norms, (*outer, 1) if node.attributes.get("keepdims", 1) else outer)]


SUM_CONVERTERS: Converters = {
    "Add": add,
    "ReduceL2": reduce_l2,
    "ReduceMean": reduction(unfused(_mean)),
    "ReduceSum": reduction(unfused(topi.sum)),
    "Sub": elementwise(unfused(topi.subtract), np.subtract),
}
