"""Attention operators as tiny traced modules, and three ways to run one: torch, onnxruntime and compiled by TVM."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxscript.optimizer
import torch
import tvm
from numpy.typing import NDArray
from torch import Tensor, nn
from tvm import relax

from engram_compilers.lowering import lower
from engram_compilers.onnx_model import read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_export.attention_operators import group_query_attention, indexed_attention, shared_attention
from engram_export.onnx_functions import add_functions
from engram_export.onnx_graph import OPSET
from engram_runtime.manifest import DECODER, GraphSpec, StateSpec, TensorSpec

Array = NDArray[np.float32]

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
CAPACITY = 149  # no whole number of vectors, index blocks or key blocks
INDEX_HEADS, INDEX_DIM, BUDGET, BLOCK, EPS = 3, 24, 8, 4, 1e-6
QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
SCALE, WINDOW = 0.25, 20
TOKEN_COUNTS = (1, 7, 64)  # of the compiled forward passes
SEQUENCES = 3  # of the compiled pass over a token of each


class Layer(nn.Module):
    """One attention layer; ``attend`` is what it computes of x ``[T, W]``, position ``[1]`` and its states."""

    def __init__(self, attend: Callable[..., tuple[Tensor, ...]], rotary_dim: int, states: Sequence[Sequence[int]]):
        super().__init__()
        angle = torch.arange(CAPACITY)[:, None] * 10000.0 ** (-torch.arange(rotary_dim // 2) / (rotary_dim // 2))
        self.attend = attend
        self.cos = nn.Parameter(angle.cos(), requires_grad=False)
        self.sin = nn.Parameter(angle.sin(), requires_grad=False)
        self.gains = nn.Parameter(1 + torch.arange(2 * INDEX_DIM).view(2, -1) / 50, requires_grad=False)
        self.states = [tuple(shape) for shape in states]

    def forward(self, x: Tensor, position: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        return self.attend(self, x, position, *states)


def _windowed(layer: Layer, x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    return group_query_attention(
        x, keys, values, position, layer.cos, layer.sin, num_heads=HEADS, scale=SCALE, window=WINDOW
    )


def _plain(layer: Layer, x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    return group_query_attention(x, keys, values, position, layer.cos, layer.sin, num_heads=HEADS, scale=SCALE)


def _shared(layer: Layer, x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    qkv, query = torch.split(x, [QKV_WIDTH, HEADS * HEAD_DIM], dim=-1)
    turn = (position, layer.cos, layer.sin)
    _, keys, values = group_query_attention(qkv, keys, values, *turn, num_heads=HEADS, scale=SCALE)
    out = shared_attention(query, keys, values, *turn, num_heads=HEADS, scale=SCALE, window=WINDOW)
    return out, keys, values


def _indexed(
    layer: Layer, x: Tensor, position: Tensor, keys: Tensor, values: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    qkv, index_qk = torch.split(x, [QKV_WIDTH, (INDEX_HEADS + 1) * INDEX_DIM], dim=-1)
    return indexed_attention(
        qkv,
        index_qk,
        layer.gains[0],
        layer.gains[1],
        keys,
        values,
        index,
        position,
        layer.cos,
        layer.sin,
        num_heads=HEADS,
        scale=SCALE,
        budget=BUDGET,
        block=BLOCK,
        eps=EPS,
    )


CACHE = (1, KV_HEADS, CAPACITY, HEAD_DIM)
LAYERS = {
    "windowed": (Layer(_windowed, HEAD_DIM // 2, [CACHE, CACHE]), QKV_WIDTH),
    "plain": (Layer(_plain, HEAD_DIM, [CACHE, CACHE]), QKV_WIDTH),
    "shared": (Layer(_shared, HEAD_DIM // 2, [CACHE, CACHE]), QKV_WIDTH + HEADS * HEAD_DIM),
    "indexed": (
        Layer(_indexed, HEAD_DIM // 2, [CACHE, CACHE, (1, 1, CAPACITY, INDEX_DIM)]),
        QKV_WIDTH + (INDEX_HEADS + 1) * INDEX_DIM,
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What came out ``[T, H * hd]``, and the filled rows of the states."""

    out: Array
    states: list[Array]


Step = Callable[[Array, int], Array]  # (x [T, W], position) -> out


def new_states(layer: Layer) -> list[Array]:
    """Return states full of NaN: no row may count before it is written."""
    return [np.full(shape, np.nan, np.float32) for shape in layer.states]


def run_steps(step: Step, states: Sequence[Array], x: Array, sizes: Sequence[int]) -> Run:
    """Run ``x [T, W]`` through a step that changes ``states``, so many tokens at a time."""
    ends = np.cumsum(sizes).tolist()
    outs = [step(x[end - size : end], end - size) for size, end in zip(sizes, ends, strict=True)]
    return Run(np.concatenate(outs), [state[:, :, : ends[-1]].copy() for state in states])


def torch_step(layer: Layer, states: list[Array]) -> Step:
    """Run the layer itself."""

    def step(x: Array, position: int) -> Array:
        found, *after = layer(torch.from_numpy(x), torch.tensor([position]), [torch.from_numpy(s) for s in states])
        for state, new in zip(states, after, strict=True):
            state[:] = new.numpy()
        out: Array = found.numpy()
        return out

    return step


def trace(layer: Layer, width: int, path: Path) -> Path:
    """Write the layer's graph: inputs x, position, state.<i>; outputs logits, next.state.<i>."""
    tokens = torch.export.Dim("T")
    arguments = (torch.empty(5, width), torch.empty(1, dtype=torch.int64), [torch.empty(s) for s in layer.states])
    dynamic: tuple[Any, ...] = ({0: tokens}, {}, [{} for _ in layer.states])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(layer, arguments, dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        assert exported is not None
        onnxscript.optimizer.optimize(exported.model)
    graph = exported.model.graph
    names = [f"state.{i}" for i in range(len(layer.states))]
    for value, name in zip(graph.inputs, ["x", "position", *names], strict=True):
        value.name = name
    for value, name in zip(graph.outputs, ["logits", *(f"next.{name}" for name in names)], strict=True):
        value.name = name
    add_functions(exported.model)
    ir.save(exported.model, path)
    return path


def ort_step(graph: Path, states: Sequence[Array]) -> Step:
    """Run a traced graph with the states bound in place."""
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = [ort.OrtValue.ortvalue_from_numpy(state) for state in states]
    for i, value in enumerate(values):
        binding.bind_ortvalue_input(f"state.{i}", value)
        binding.bind_ortvalue_output(f"next.state.{i}", value)

    def step(x: Array, position: int) -> Array:
        binding.bind_cpu_input("x", np.ascontiguousarray(x))
        binding.bind_cpu_input("position", np.array([position]))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        out: Array = binding.get_outputs()[len(values)].numpy()
        return out

    return step


def compile_graph(graph: Path, layer: Layer, width: int) -> Any:
    """Compile a traced graph; return a virtual machine with ``forward_<T>_<T>`` and ``batch_<SEQUENCES>``."""
    states = tuple(
        StateSpec(name=f"state.{i}", dtype="float32", shape=shape, kind="positional")
        for i, shape in enumerate(layer.states)
    )
    x = TensorSpec(name="x", dtype="float32", shape=("T", width))
    position = TensorSpec(name="position", dtype="int64", shape=(1,))
    spec = GraphSpec(file=graph.name, weights="", inputs=(x, position), outputs=(), states=states)
    passes = [(tokens, tokens) for tokens in TOKEN_COUNTS]
    no_weights = graph.with_name("weights")
    no_weights.write_bytes(bytes(64))
    packed_file = graph.with_name("packed")
    packed_file.unlink(missing_ok=True)
    with PackedWeights(packed_file) as packed:
        graphs = {DECODER: (read_onnx_model(graph, no_weights), spec)}
        module = lower(graphs, packed, family="portable", passes=passes, batches=[SEQUENCES]).module
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    return relax.VirtualMachine(relax.build(module, target), tvm.cpu())


def tvm_step(machine: Any, states: Sequence[Array]) -> Step:
    """Run a compiled graph; states are copied to and from tensors of its own."""
    held = [tvm.runtime.tensor(state) for state in states]

    def step(x: Array, position: int) -> Array:
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(x)), tvm.runtime.tensor(np.array([position]))]
        out: Array = machine[f"forward_{len(x)}_{len(x)}"](*arguments, *held)[0].numpy()
        for state, changed in zip(states, held, strict=True):
            state[:] = changed.numpy()
        return out

    return step


def tvm_run(machine: Any, layer: Layer, x: Array, sizes: Sequence[int]) -> Run:
    """Run a compiled graph on new states."""
    states = new_states(layer)
    return run_steps(tvm_step(machine, states), states, x, sizes)
