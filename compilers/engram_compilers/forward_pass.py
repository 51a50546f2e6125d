"""One forward pass of a fixed number of tokens, being lowered from ONNX to Relax."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax, tirx

from engram_compilers.kernels import activation, normalise, quantise
from engram_compilers.kernels.activation import Function
from engram_compilers.onnx_model import Node, OnnxModel, Weight
from engram_compilers.packed_weights import Pack, WeightArguments
from engram_compilers.values import Activation, Batched, Deferred, Half, HalfGelu, HalfSigmoid, HalfSilu, Softmax, Value
from engram_runtime.errors import CompileError

MakeKernel = Callable[[], tirx.PrimFunc]


@dataclass(frozen=True, slots=True)
class ExpertRead:
    """What a mixture of experts reads in a forward pass: ``count i32 [1]`` experts of ``expert_bytes`` each."""

    count: relax.Expr
    expert_bytes: int


class KernelCache:
    """The kernels of a library, each generated once for its name."""

    def __init__(self, builder: relax.BlockBuilder, family: ModuleType, expert_family: ModuleType) -> None:
        self.builder = builder
        self.family = family  # engram_compilers.kernels.<family>
        self.expert_family = expert_family  # engram_compilers.kernels.<family>_experts
        self._known: dict[str, Any] = {}

    def get(self, name: str, make: MakeKernel) -> Any:
        """Return the global variable of a kernel, generating it the first time."""
        if name not in self._known:
            self._known[name] = self.builder.add_func(make(), name)
        return self._known[name]


class ForwardPass:
    """Values by ONNX name, and the few ways to compute new ones."""

    def __init__(self, kernels: KernelCache, arguments: WeightArguments, model: OnnxModel) -> None:
        self.kernels = kernels
        self.arguments = arguments
        self.model = model
        self.position: relax.Expr = None
        self.expert_reads: list[ExpertRead] = []
        self._values: dict[str, Value] = {**model.constants, **model.weights}
        self._quantised: dict[Activation, list[relax.Expr]] = {}
        self._held: dict[Activation, Activation] = {}

    def set(self, name: str, value: Value) -> None:
        """Define an ONNX value."""
        self._values[name] = value

    def is_defined(self, name: str) -> bool:
        """Return whether an ONNX value is known by now."""
        return name in self._values

    def get(self, name: str) -> Value:
        """Return an ONNX value; None for an input that is left out."""
        return self._values[name] if name else None

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

    def materialise(self, value: Deferred) -> Activation:
        """Compute a value that was put off in the hope of a fused kernel."""
        if isinstance(value, Half):
            width = value.whole.shape[-1] // 2
            begin = value.index * width
            sliced = relax.op.strided_slice(value.whole.expr, [-1], [begin], [begin + width])
            return self.emit(sliced, (*value.whole.shape[:-1], width))
        if isinstance(value, Softmax):
            return self.emit(relax.op.nn.softmax(value.whole.expr, axis=-1), value.whole.shape)
        half = self.materialise(value.half)
        if isinstance(value, HalfGelu):
            return self.gelu(half)
        operator = relax.op.sigmoid if isinstance(value, HalfSigmoid) else relax.op.nn.silu
        assert isinstance(value, HalfSigmoid | HalfSilu)
        return self.emit(operator(half.expr), half.shape)

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
        """Call a kernel that changes ``states``, its last arguments, and has new outputs of ``shapes``; all float32.

        Returned are the states, in the same memory with their next contents, then the outputs; nothing may read
        ``states`` themselves any more.
        """
        results = [state.shape for state in states] + [tuple(shape) for shape in shapes]
        places = [len(inputs) + i for i in range(len(states))] + [-1] * len(shapes)
        types = [relax.TensorType(shape, "float32") for shape in results]
        arguments = [*inputs, *(state.expr for state in states)]
        builder = self.kernels.builder
        made = builder.emit(relax.op.call_tir_inplace(kernel, arguments, places, types))
        exprs = [made] if len(results) == 1 else [builder.emit(made[i]) for i in range(len(results))]
        values = [Activation(expr, shape, "float32") for expr, shape in zip(exprs, results, strict=True)]
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

    def quantised(self, x: Activation) -> list[relax.Expr]:
        """Return planes, row scales and plane offsets of ``x [M, K]``, computed once however many layers read it."""
        if x not in self._quantised:
            self._quantised[x] = self._quantise(x)
        return self._quantised[x]

    def _quantise(self, x: Activation) -> list[relax.Expr]:
        rows, columns = x.shape
        padded = -(-columns // quantise.PLANE_MULTIPLE) * quantise.PLANE_MULTIPLE
        kernel = self.kernels.get(f"quantise_{rows}_{columns}", lambda: quantise.quantise_rows(rows, columns))
        types = [
            relax.TensorType((2 * rows, padded), "int8"),
            relax.TensorType((rows,), "float32"),
            relax.TensorType((2 * rows,), "int32"),
        ]
        builder = self.kernels.builder
        results = builder.emit(relax.call_tir(kernel, [x.expr], out_ty=types))
        return [builder.emit(results[index]) for index in range(3)]

    def rms_norm(self, x: Activation, gain: Activation, eps: float) -> Activation:
        """Normalise over the last axis."""
        flat = self.reshape(x, (int(np.prod(x.shape[:-1])), x.shape[-1]))
        return self.reshape(self.branch_norm(flat, gain, eps, 1), x.shape)

    def branch_norm(self, x: Activation, gain: Activation | None, eps: float, branches: int) -> Activation:
        """Normalise each of the equal parts of ``x [M, G * D]``; ``gain [G * D]``, or None for ones."""
        rows, columns = x.shape[0] * branches, x.shape[1] // branches
        gains = 1 if gain is None else branches
        name = f"rms_norm_{rows}_{columns}_{eps}_{gains}"
        kernel = self.kernels.get(name, lambda: normalise.rms_norm(rows, columns, eps, gains))
        factor = relax.const(np.ones(columns, dtype=np.float32)) if gain is None else gain.expr
        flat = self.reshape(x, (rows, columns))
        return self.reshape(self.call(kernel, [flat.expr, factor], (rows, columns)), x.shape)

    def silu_mul(self, gate_up: Activation) -> Activation:
        """Return silu(first half) * second half."""
        return self._gated("silu_mul", activation.silu_mul, gate_up)

    def gelu_mul(self, gate_up: Activation) -> Activation:
        """Return gelu(first half) * second half."""
        return self._gated("gelu_mul", activation.gelu_mul, gate_up)

    def _gated(self, name: str, make: Callable[[int, int], tirx.PrimFunc], gate_up: Activation) -> Activation:
        rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
        kernel = self.kernels.get(f"{name}_{rows}_{columns}", lambda: make(rows, columns))
        return self.call(kernel, [gate_up.expr], (rows, columns))

    def gelu(self, x: Activation) -> Activation:
        """Return gelu of every value, by tanh."""
        return self._each("gelu", activation.gelu, x)

    def tanh(self, x: Activation) -> Activation:
        """Return tanh of every value."""
        return self._each("tanh", activation.tanh, x)

    def _each(self, name: str, function: Function, x: Activation) -> Activation:
        size = int(np.prod(x.shape))
        kernel = self.kernels.get(f"{name}_{size}", lambda: activation.each(size, function))
        return self.reshape(self.call(kernel, [self.reshape(x, (size,)).expr], (size,)), x.shape)

    def add(self, a: Activation, b: Activation) -> Activation:
        """Add two activations of the same shape."""
        rows, columns = a.shape
        kernel = self.kernels.get(f"add_{rows}_{columns}", lambda: activation.add(rows, columns))
        return self.call(kernel, [a.expr, b.expr], a.shape)

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
