"""An executor that interprets straight-line programs: numpy arrays, and kernels compiled one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tests.test_kernels import compile_kernels

from engram_compilers.lowering import LoweredGraphs, lower
from engram_compilers.onnx_model import read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_compilers.program import (
    AwaitRows,
    Constant,
    Input,
    Output,
    Program,
    Programs,
    Scratch,
    State,
    Tensor,
    Weight,
)
from engram_compilers.straight_line import programs
from engram_runtime.bundle import Bundle
from engram_runtime.executor import State as StateArray
from engram_runtime.executor import StepInputs, aligned_zeros
from engram_runtime.library import PackedTensor, pass_function
from engram_runtime.manifest import DECODER, EMBEDDINGS, HIDDEN
from engram_runtime.tables.decoding import RowDecoder

Array = NDArray[Any]
Passes = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class LoweredBundle:
    """A bundle's portable programs and the packed weights they read."""

    lowered: LoweredGraphs
    programs: Programs
    tensors: Sequence[PackedTensor]
    weights: Array


def lower_bundle(bundle: Bundle, folder: Path, passes: Passes, batches: Sequence[int] = ()) -> LoweredBundle:
    """Lower all graphs of a bundle with portable kernels."""
    specs = dict(bundle.manifest.graphs)
    graphs = {name: (read_onnx_model(bundle.file(s.file), bundle.file(s.weights)), s) for name, s in specs.items()}
    with PackedWeights(folder / "weights.bin") as packed:
        lowered = lower(graphs, packed, family="portable", passes=passes, batches=batches)
        tensors = tuple(packed.tensors.values())
    weights = aligned_zeros((tensors[-1].end,), "uint8")
    weights[:] = np.fromfile(folder / "weights.bin", dtype=np.uint8, count=tensors[-1].end)
    return LoweredBundle(lowered, programs(lowered, specs), tensors, weights)


class Interpreter:
    """Runs programs by calling their kernels."""

    def __init__(self, lowered: LoweredBundle) -> None:
        self.lowered = lowered
        self._kernels: Mapping[str, Callable[..., None]] = compile_kernels(dict(lowered.programs.kernels))
        self._constants = [aligned(array) for array in lowered.programs.constants]

    def run(
        self,
        program: Program,
        inputs: Mapping[str, Array],
        states: Sequence[Mapping[str, StateArray]],
        fill: Callable[[int, Array], None],
    ) -> list[Array]:
        """Return the program's outputs; ``fill`` is asked for the rows of a site."""
        scratch = aligned_zeros((program.scratch_bytes,), "uint8")
        scratch[:] = 0xFF  # what is read before it is written is nan
        given = {name: aligned(values) for name, values in inputs.items()}
        outputs: dict[int, Array] = {}

        def array(tensor: Tensor) -> Array:
            match tensor.place:
                case Input(name):
                    memory: Array = given[name]
                case State(name, sequence):
                    memory = states[sequence][name]
                case Constant(index):
                    memory = self._constants[index]
                case Output(index):
                    memory = outputs.setdefault(index, aligned_zeros(tensor.shape, tensor.dtype))
                case Scratch(offset):
                    memory = scratch[offset : offset + tensor.bytes].view(tensor.dtype)
                case Weight(index):
                    packed = self.lowered.tensors[index]
                    memory = self.lowered.weights[packed.offset : packed.end].view(packed.dtype)
            assert memory.dtype.name == tensor.dtype
            return memory.reshape(tensor.shape)

        for call in program.calls:
            if isinstance(call, AwaitRows):
                fill(call.site, array(call.rows))
            else:
                self._kernels[call.kernel](*(tvm.runtime.from_dlpack(array(each)) for each in call.arguments))
        return [array(each) for each in program.outputs]


def aligned(values: Array) -> Array:
    """Return a copy at an aligned address."""
    copy = aligned_zeros(values.shape, values.dtype.name)
    copy[...] = values
    return copy


class ProgramExecutor:
    """See `engram_runtime.executor.Executor`."""

    name, threads = "program", 1
    expert_bytes_read = experts_read = None

    def __init__(self, bundle: Bundle, lowered: LoweredBundle, passes: Passes) -> None:
        self.interpreter = Interpreter(lowered)
        self.float16_states = lowered.lowered.float16_states
        self._told = {name: spec.told_outputs for name, spec in bundle.manifest.graphs.items()}
        self._sizes = sorted({tokens for tokens, _ in passes})

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        sizes: list[int] = []
        while sum(sizes) < count:
            sizes.append(max(size for size in self._sizes if size <= count - sum(sizes)))
        return sizes

    def row_decoder(self, site: str) -> RowDecoder | None:
        return None

    def bind(self, states: Mapping[str, StateArray], graph: str = DECODER) -> "ProgramStep":
        return ProgramStep(self.interpreter, states, graph, self._told[graph])


@dataclass(slots=True)
class ProgramStep:
    """See `engram_runtime.executor.Step`."""

    interpreter: Interpreter
    states: Mapping[str, StateArray]
    graph: str
    names: Sequence[str]
    told: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        program = self.interpreter.lowered.programs.of[
            pass_function(self.graph, len(inputs.token_ids), len(inputs.logit_rows))
        ]
        pending = list(inputs.rows.values())
        empty = (np.full(rows.shape, np.nan, dtype=np.float32) for rows in pending)
        given: dict[str, Array] = {
            "token_ids": inputs.token_ids,
            "position": np.array([inputs.position], dtype=np.int64),
            "logit_rows": inputs.logit_rows,
            **dict(zip((f"rows.{site}" for site in inputs.rows), empty, strict=True)),
        }
        more = {HIDDEN: inputs.hidden, EMBEDDINGS: inputs.embeddings}
        given |= {name: values for name, values in more.items() if values is not None}
        logits, *others = self.interpreter.run(
            program, given, [self.states], lambda site, rows: pending[site].fill(rows)
        )
        self.told = dict(zip(self.names, others, strict=False))
        return logits
