"""One forward pass of a fixed number of tokens, being lowered from ONNX to Relax."""

import copy
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from engram_compilers.kernel_cache import KernelCache, MakeKernel
from engram_compilers.kernel_sets import SharedKernels
from engram_compilers.onnx_model import Node, OnnxModel, Weight
from engram_compilers.packed_weights import Pack, WeightArguments
from engram_compilers.values import (
    Activation,
    Batched,
    Deferred,
    Gated,
    Half,
    HalfGelu,
    HalfSigmoid,
    HalfSilu,
    Normed,
    Rows,
    Softmax,
    Sum,
    Value,
)
from engram_runtime.errors import CompileError
from engram_runtime.library import AWAIT_ROWS

POSITION = "position"  # the input of a graph


@dataclass(frozen=True, slots=True)
class ExpertRead:
    """What a mixture of experts reads in a forward pass: ``count i32 [1]`` experts of ``expert_bytes`` each."""

    count: relax.Expr
    expert_bytes: int


class ForwardPass:
    """Values by ONNX name, and the few ways to compute new ones."""

    def __init__(self, kernels: KernelCache, arguments: WeightArguments, model: OnnxModel) -> None:
        self.kernels = kernels
        self.arguments = arguments
        self.model = model
        self.expert_reads: list[ExpertRead] = []
        self.pending_rows: dict[str, tuple[int, Activation]] = {}  # by input, filled when the pass comes to its site
        self._values: MutableMapping[str, Value] = {**model.constants, **model.weights}
        self._computed: dict[Deferred, Activation] = {}
        self._quantised: dict[tuple[Rows, int], list[relax.Expr]] = {}
        self._held: dict[Activation, Activation] = {}

    @property
    def _shared(self) -> SharedKernels:
        return self.kernels.shared

    @property
    def position(self) -> relax.Expr:
        """How many tokens the caches hold already, ``i64 [1]``."""
        position = self.get(POSITION)
        if not isinstance(position, Activation):
            raise CompileError(f"{POSITION} of the graph is {position!r}, which no kernel takes")
        return position.expr

    def of_sequence(self, own: Mapping[str, Value]) -> "ForwardPass":
        """Return the same pass with ``own`` values in place of those of these names."""
        other = copy.copy(self)
        other._values = ChainMap(dict(own), self._values)
        return other

    def set(self, name: str, value: Value) -> None:
        """Define an ONNX value."""
        self._values[name] = value

    def is_defined(self, name: str) -> bool:
        """Return whether an ONNX value is known by now."""
        return name in self._values

    def get(self, name: str) -> Value:
        """Return an ONNX value; None for an input that is left out."""
        return self._values[name] if name else None

    def await_rows(self, node: Node) -> None:
        """Have the rows that a node is the first to read put into their input before it."""
        for name in node.inputs:
            if name in self.pending_rows:
                site, rows = self.pending_rows.pop(name)
                of_type = relax.TensorType(rows.shape, rows.dtype)
                arguments = rows.expr, relax.prim_value(site)
                filled = relax.op.call_inplace_packed(AWAIT_ROWS, *arguments, inplace_indices=0, ty_args=of_type)
                self.set(name, self.emit(filled, rows.shape, rows.dtype))

    def activation(self, node: Node, index: int) -> Activation:
        """Return a node's input as an activation, computing what was put off."""
        value = self.get(node.inputs[index])
        if isinstance(value, Activation):
            return value
        if isinstance(value, Deferred):
            return self.materialise(value)
        if isinstance(value, Batched):
            return self.reshape(value.inner, (1, *value.inner.shape))
        if isinstance(value, np.ndarray):
            return Activation(relax.const(value, value.dtype.name), value.shape, value.dtype.name)
        if isinstance(value, Weight):
            (variable,) = self.plain_weight(value)
            return Activation(variable, value.shape, value.dtype)
        raise CompileError(f"input {node.inputs[index]} of {node.operator} is {value!r}, which it can't take")

    def rows(self, node: Node, index: int) -> Rows:
        """Return a node's input ``[M, K]`` for `quantised`, whose kernel may compute what was put off."""
        value = self.get(node.inputs[index])
        return value if isinstance(value, Sum | Normed | Gated) else self.activation(node, index)

    def materialise(self, value: Activation | Deferred) -> Activation:
        """Compute a value that was put off in the hope of a fused kernel, once."""
        if isinstance(value, Activation):
            return value
        if value not in self._computed:
            self._computed[value] = self._compute(value)
        return self._computed[value]

    def _compute(self, value: Deferred) -> Activation:
        match value:
            case Half(whole=whole, index=index):
                width = whole.shape[-1] // 2
                sliced = relax.op.strided_slice(whole.expr, [-1], [index * width], [(index + 1) * width])
                return self.emit(sliced, (*whole.shape[:-1], width))
            case HalfSigmoid() | HalfSilu():
                half = self.materialise(value.half)
                operator = relax.op.sigmoid if isinstance(value, HalfSigmoid) else relax.op.nn.silu
                return self.emit(operator(half.expr), half.shape)
            case HalfGelu():
                return self.gelu(self.materialise(value.half))
            case Softmax(whole=whole):
                return self.emit(relax.op.nn.softmax(whole.expr, axis=-1), whole.shape)
            case Sum(a=a, b=b):
                rows, columns = a.shape
                kernel = self.kernels.get(f"add_{rows}_{columns}", lambda: self._shared.activation.add(rows, columns))
                return self.call(kernel, [a.expr, b.expr], a.shape)
            case Normed(x=x, gain=gain, eps=eps):
                return self.rms_norm(self.materialise(x), gain, eps)
            case Gated(gate_up=gate_up, function=name):
                rows, columns = value.shape
                gates = self._shared.activation.GATES
                make = partial(self._shared.activation.gated, rows, columns, gates[name])
                return self.call(self.kernels.get(f"{name}_mul_{rows}_{columns}", make), [gate_up.expr], value.shape)

    def emit(self, expr: relax.Expr, shape: Sequence[int], dtype: str = "float32") -> Activation:
        """Bind an expression of Relax's own operators."""
        return Activation(self.kernels.builder.emit(expr), tuple(shape), dtype)

    def call(self, kernel: Any, inputs: Sequence[relax.Expr], shape: Sequence[int]) -> Activation:
        """Call a kernel with one float32 output."""
        out = relax.TensorType(tuple(shape), "float32")
        return self.emit(relax.call_tir(kernel, list(inputs), out_ty=out), shape)

    def call_in_place(
        self,
        kernel: Any,
        inputs: Sequence[relax.Expr],
        states: Sequence[Activation],
        shapes: Sequence[Sequence[int]] = (),
    ) -> list[Activation]:
        """Call a kernel that changes ``states``, its last arguments, and has new float32 outputs of ``shapes``.

        Returned are the states, in the same memory with their next contents, then the outputs; nothing may read
        ``states`` themselves any more.
        """
        results = [(state.shape, state.dtype) for state in states] + [(tuple(shape), "float32") for shape in shapes]
        places = [len(inputs) + i for i in range(len(states))] + [-1] * len(shapes)
        types = [relax.TensorType(shape, dtype) for shape, dtype in results]
        arguments = [*inputs, *(state.expr for state in states)]
        builder = self.kernels.builder
        made = builder.emit(relax.op.call_tir_inplace(kernel, arguments, places, types))
        exprs = [made] if len(results) == 1 else [builder.emit(made[i]) for i in range(len(results))]
        values = [Activation(expr, shape, dtype) for expr, (shape, dtype) in zip(exprs, results, strict=True)]
        for state, following in zip(states, values, strict=False):  # the outputs come after
            self._held[following] = self._held.get(state, state)
        return values

    def is_held_in(self, value: Activation, state: Activation) -> bool:
        """Return whether ``value`` is what kernels have made of ``state``, in its memory."""
        return self._held.get(value) is state

    def plain_weight(self, weight: Weight) -> list[relax.Var]:
        """Return the argument for a weight that is used as it is stored."""
        return self.arguments.of(weight.name, lambda: {"plain": self.model.read(weight)})

    def packed_weight(self, weight: Weight, pack: Pack) -> list[relax.Var]:
        """Return the arguments for a weight that the kernel family packs."""
        return self.arguments.of(f"{weight.name}:packed", pack)

    def quantised(self, x: Rows, planes: int) -> list[relax.Expr]:
        """Return `quantise.QuantisedRows` of ``x [M, K]``, computed once however many layers read it.

        The rows themselves are not written where this computes them and no other node has read them before.
        """
        if (x, planes) not in self._quantised:
            self._quantised[x, planes] = self._quantise(x, planes)
        return self._quantised[x, planes]

    def _quantise(self, x: Rows, planes: int) -> list[relax.Expr]:
        rows, columns = x.shape
        match self._computed.get(x, x) if isinstance(x, Deferred) else x:
            case Gated(gate_up=gate_up, function=name):
                kernels = self._shared.activation
                make = partial(kernels.gated_quantise, rows, columns, kernels.GATES[name], planes)
                return self._call_quantising(f"{name}_quantise", make, [gate_up], x, planes)
            case Normed(x=Sum(a=a, b=b) as total, gain=gain, eps=eps) if total not in self._computed:
                make = partial(self._shared.normalise.add_norm_quantise, rows, columns, eps, planes)
                name = f"add_norm_quantise_{eps}"
                written, *results = self._call_quantising(name, make, [a, b, gain], x, planes, [x.shape])
                self._computed[total] = Activation(written, x.shape, "float32")
                return results
            case Normed(x=normed, gain=gain, eps=eps):
                make = partial(self._shared.normalise.norm_quantise, rows, columns, eps, planes)
                inputs = [self.materialise(normed), gain]
                return self._call_quantising(f"norm_quantise_{eps}", make, inputs, x, planes)
            case other:
                make = partial(self._shared.quantise.quantise_rows, rows, columns, planes)
                return self._call_quantising("quantise", make, [self.materialise(other)], x, planes)

    def _call_quantising(
        self,
        name: str,
        make: MakeKernel,
        inputs: Sequence[Activation],
        x: Rows,
        planes: int,
        shapes: Sequence[Sequence[int]] = (),
    ) -> list[relax.Expr]:
        """Call a kernel whose results are float32 of ``shapes``, then `quantise.QuantisedRows` of ``x``."""
        rows, columns = x.shape
        types = [relax.TensorType(shape, "float32") for shape in shapes]
        types += [relax.TensorType(*of) for of in self._shared.quantise.quantised_types(rows, columns, planes)]
        kernel = self.kernels.get(f"{name}_{rows}_{columns}_{planes}", make)
        builder = self.kernels.builder
        results = builder.emit(relax.call_tir(kernel, [value.expr for value in inputs], out_ty=types))
        return [builder.emit(results[index]) for index in range(len(types))]

    def rms_norm(self, x: Activation, gain: Activation, eps: float) -> Activation:
        """Normalise over the last axis."""
        flat = self.reshape(x, (int(np.prod(x.shape[:-1])), x.shape[-1]))
        return self.reshape(self.branch_norm(flat, gain, eps, 1), x.shape)

    def branch_norm(self, x: Activation, gain: Activation | None, eps: float, branches: int) -> Activation:
        """Normalise each of the equal parts of ``x [M, G * D]``; ``gain [G * D]``, or None for ones."""
        rows, columns = x.shape[0] * branches, x.shape[1] // branches
        gains = 1 if gain is None else branches
        name = f"rms_norm_{rows}_{columns}_{eps}_{gains}"
        kernel = self.kernels.get(name, lambda: self._shared.normalise.rms_norm(rows, columns, eps, gains))
        factor = relax.const(np.ones(columns, dtype=np.float32)) if gain is None else gain.expr
        flat = self.reshape(x, (rows, columns))
        return self.reshape(self.call(kernel, [flat.expr, factor], (rows, columns)), x.shape)

    def gelu(self, x: Activation) -> Activation:
        """Return gelu of every value, by tanh."""
        return self._each("gelu", x)

    def tanh(self, x: Activation) -> Activation:
        """Return tanh of every value."""
        return self._each("tanh", x)

    def _each(self, name: str, x: Activation) -> Activation:
        size, kernels = int(np.prod(x.shape)), self._shared.activation
        kernel = self.kernels.get(f"{name}_{size}", lambda: kernels.each(size, getattr(kernels, name)))
        return self.reshape(self.call(kernel, [self.reshape(x, (size,)).expr], (size,)), x.shape)

    def reshape(self, x: Activation, shape: Sequence[int]) -> Activation:
        """Return ``x`` in another shape."""
        if x.shape == tuple(shape):
            return x
        return self.emit(relax.op.reshape(x.expr, tuple(shape)), shape, x.dtype)


def scalar(values: NDArray[Any]) -> Any:
    """Return the one value of a constant."""
    return values.reshape(-1)[0].item()


def scale_of(node: Node) -> float:
    """Return the factor of an attention's scores or output."""
    scale: float = node.attributes["scale"]
    if not scale:
        raise CompileError(f"{node.operator} has scale 0, which means 1 / sqrt of its dimensions; write that number")
    return scale


def unbatched(forward: ForwardPass, node: Node, index: int) -> Activation:
    """Return an input without its leading axis of one, which the graph must have put there."""
    value = forward.get(node.inputs[index])
    if not isinstance(value, Batched):
        raise CompileError(f"input {node.inputs[index]} of {node.operator} has no leading axis of one; unsqueeze it")
    return value.inner


Converter = Callable[[ForwardPass, Node], Sequence[Value]]
Converters = Mapping[str, Converter]
