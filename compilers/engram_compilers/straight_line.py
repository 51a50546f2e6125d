"""Take a lowered module apart into straight-line programs.

Its functions go through the passes of Relax that a library for the virtual machine goes through, up to where that
machine's own begin: the kernels are the same ones, fused alike, so results are the same bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import tvm
from numpy.typing import NDArray
from tvm import relax, s_tir, tirx
from tvm.relax.backend.cpu_generic import pipeline

from engram_compilers.lowering import LoweredGraphs
from engram_compilers.program import (
    AwaitRows,
    Constant,
    Input,
    KernelCall,
    Output,
    Place,
    Program,
    Programs,
    Scratch,
    State,
    Tensor,
    Weight,
)
from engram_compilers.scratch_plan import Lifetime, plan_scratch
from engram_runtime.errors import CompileError
from engram_runtime.executor import ALIGNMENT_BYTES
from engram_runtime.library import AWAIT_ROWS, ITEM_BYTES
from engram_runtime.manifest import DECODER, GraphSpec

Array = NDArray[Any]


def programs(lowered: LoweredGraphs, specs: Mapping[str, GraphSpec], alignment: int = ALIGNMENT_BYTES) -> Programs:
    """Return the programs of a lowered module's forward passes.

    Args:
        specs: of the graphs that were lowered, by name.
        alignment: of offsets in scratch memory, bytes.

    Raises:
        CompileError: a forward pass calls what only the virtual machine has.
    """
    module = _fused(lowered.module)
    copies = _copies(module)
    constants = _Constants()
    made = {}
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            name = variable.name_hint
            graph = next((graph for graph in specs if name.startswith(f"{graph}_")), DECODER)
            places = _parameter_places(function, specs[graph], lowered.graph_tensors[graph])
            made[name] = _Walk(name, places, constants, copies, alignment).program(function, len(specs[graph].inputs))
    called = {call.kernel for program in made.values() for call in program.calls if isinstance(call, KernelCall)}
    return Programs(of=made, kernels={name: module[name] for name in sorted(called)}, constants=constants.arrays)


def _fused(module: tvm.IRModule) -> tvm.IRModule:
    """Run what comes first in `relax.get_default_pipeline`."""
    target = tvm.target.Target({"kind": "llvm"})
    stages = (pipeline.library_dispatch_passes, pipeline.legalize_passes, pipeline.dataflow_lower_passes)
    with target:
        return tvm.transform.Sequential([one for stage in stages for one in stage(target)])(module)


def _parameter_places(function: relax.Function, spec: GraphSpec, weights: Sequence[int]) -> list[Place]:
    """Return the places of a function's parameters: inputs, states of each sequence, weights."""
    held = int(function.attrs["num_input"]) - len(spec.inputs)
    sequences = held // max(len(spec.states), 1)
    states = [State(state.name, sequence) for sequence in range(sequences) for state in spec.states]
    return [*(Input(tensor.name) for tensor in spec.inputs), *states, *(Weight(index) for index in weights)]


def _copies(module: tvm.IRModule) -> frozenset[str]:
    """Return the names of the kernels that copy an array in another shape: several reshapes that Relax fused."""
    return frozenset(
        variable.name_hint
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and "op_pattern" not in function.attrs and _is_copy(function)
    )


def _is_copy(function: tirx.PrimFunc) -> bool:
    if len(function.params) != 2:
        return False
    schedule = s_tir.Schedule(function)
    *inner, _ = schedule.get_child_blocks(schedule.get_sblock("root"))
    for block in inner:
        schedule.compute_inline(block)
    return bool(relax.analysis.has_reshape_pattern(schedule.mod["main"]))


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Memory whose place isn't known yet, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class _Value:
    dtype: str
    shape: tuple[int, ...]
    origin: Place | _Buffer

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class _Constants:
    """Arrays of all programs, each once."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self._places: dict[tuple[str, tuple[int, ...], bytes], Constant] = {}

    def place(self, array: Array) -> Constant:
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._places:
            self._places[key] = Constant(len(self.arrays))
            self.arrays.append(array)
        return self._places[key]


@dataclass(slots=True)
class _Call:
    """A call of ``kernel``, or the wait for the rows of ``site``."""

    arguments: list[_Value]
    kernel: str = ""
    site: int = 0

    def placed(self, place: Callable[[_Value], Tensor]) -> KernelCall | AwaitRows:
        tensors = tuple(place(argument) for argument in self.arguments)
        return KernelCall(self.kernel, tensors) if self.kernel else AwaitRows(self.site, tensors[0])


@dataclass(slots=True)
class _Walk:
    """The way through the bindings of one function."""

    name: str
    parameters: Sequence[Place]
    constants: _Constants
    copies: frozenset[str]
    alignment: int
    calls: list[_Call] = field(default_factory=list)
    buffers: list[_Value] = field(default_factory=list)
    values: dict[relax.Var, _Value | list[_Value]] = field(default_factory=dict)

    def program(self, function: relax.Function, inputs: int) -> Program:
        """Return the function's program; its first parameters are ``inputs``."""
        given = [_of_type(parameter, place) for parameter, place in zip(function.params, self.parameters, strict=True)]
        self.values.update(zip(function.params, given, strict=True))
        for block in function.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._evaluate(binding.value, binding.var)
        results = self._evaluate(function.body.body, function.body.body)
        outputs = results if isinstance(results, list) else [results]
        places, scratch_bytes = self._places(outputs)

        def placed(value: _Value) -> Tensor:
            origin = places[value.origin.number] if isinstance(value.origin, _Buffer) else value.origin
            return Tensor(value.dtype, value.shape, origin)

        return Program(
            name=self.name,
            calls=tuple(call.placed(placed) for call in self.calls),
            inputs=tuple(placed(value) for value in given[:inputs]),
            outputs=tuple(placed(value) for value in outputs),
            scratch_bytes=scratch_bytes,
        )

    def _evaluate(self, expr: relax.Expr, variable: relax.Var) -> _Value | list[_Value]:
        """Return what an expression that is bound to ``variable`` stands for; a call is noted."""
        match expr:
            case relax.Tuple():
                return [self._value(item) for item in expr.fields]
            case relax.TupleGetItem():
                items = self.values[expr.tuple_value]
                assert isinstance(items, list)
                return items[int(expr.index)]
            case relax.Call():
                return self._call(expr, variable)
        return self._value(expr)

    def _value(self, expr: relax.Expr) -> _Value:
        if isinstance(expr, tvm.ir.GenericConst):
            array = expr.value.numpy()
            return _Value(array.dtype.name, array.shape, self.constants.place(array))
        value = self.values[expr]
        assert isinstance(value, _Value)
        return value

    def _call(self, call: relax.Call, variable: relax.Var) -> _Value | list[_Value]:
        match call.op:
            case tvm.ir.GlobalVar():
                return self._run(call.op.name_hint, call.args)
            case relax.ExternFunc() if call.op.global_symbol == AWAIT_ROWS:
                rows, site = call.args
                self.calls.append(_Call([self._value(rows)], site=int(site)))
                return self._value(rows)
            case tvm.ir.Op(name="relax.builtin.alloc_tensor"):
                self.buffers.append(_of_type(variable, _Buffer(len(self.buffers))))
                return self.buffers[-1]
            case tvm.ir.Op(name="relax.reshape"):
                return _of_type(variable, self._value(call.args[0]).origin)
        raise CompileError(f"{self.name} calls {call.op}, which a straight-line program can't express")

    def _run(self, kernel: str, arguments: Sequence[relax.Expr]) -> list[_Value]:
        """Note the call of a kernel; a copy is a view, unless of a state, which may change before it is read."""
        values = [self._value(argument) for argument in arguments]
        if kernel in self.copies and not isinstance(values[0].origin, State):
            self.values[arguments[1]] = replace(values[1], origin=values[0].origin)
        else:
            self.calls.append(_Call(values, kernel))
        return []

    def _places(self, outputs: Sequence[_Value]) -> tuple[dict[int, Place], int]:
        """Return the place of each buffer, and the bytes of scratch memory."""
        touched: dict[int, list[int]] = {}
        for index, call in enumerate(self.calls):
            for number in {value.origin.number for value in call.arguments if isinstance(value.origin, _Buffer)}:
                touched.setdefault(number, []).append(index)
        places: dict[int, Place] = {
            value.origin.number: Output(index)
            for index, value in reversed(list(enumerate(outputs)))
            if isinstance(value.origin, _Buffer)
        }
        kept = [number for number in touched if number not in places]
        lifetimes = [Lifetime(self.buffers[n].bytes, touched[n][0], touched[n][-1]) for n in kept]
        offsets, scratch_bytes = plan_scratch(lifetimes, self.alignment)
        places |= {number: Scratch(offset) for number, offset in zip(kept, offsets, strict=True)}
        return places, scratch_bytes


def _of_type(variable: relax.Var, origin: Place | _Buffer) -> _Value:
    return _Value(str(variable.ty.dtype), tuple(int(extent) for extent in variable.ty.shape.values), origin)
