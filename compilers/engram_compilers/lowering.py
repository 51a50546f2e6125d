"""Lower a bundle's ONNX graph to a Relax module with one function per forward pass."""

import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import tvm
from tvm import relax

from engram_compilers.attention_converters import ATTENTION_CONVERTERS, BATCH_CONVERTERS, CACHE_INPUTS
from engram_compilers.expert_converters import EXPERT_CONVERTERS
from engram_compilers.forward_pass import POSITION, Converters, ExpertRead, ForwardPass
from engram_compilers.kernel_cache import KernelCache
from engram_compilers.kernel_converters import KERNEL_CONVERTERS
from engram_compilers.kernel_sets import shared_kernels
from engram_compilers.onnx_model import Node, OnnxModel
from engram_compilers.packed_weights import PackedWeights, WeightArguments
from engram_compilers.recurrent_converters import RECURRENT_CONVERTERS
from engram_compilers.sequences import convert_apart, split_rows, takes_apart
from engram_compilers.signatures import SIGNATURES
from engram_compilers.standard_converters import STANDARD_CONVERTERS
from engram_compilers.stream_converters import STREAM_CONVERTERS
from engram_compilers.sum_converters import SUM_CONVERTERS
from engram_compilers.tuning.blocks import blocked
from engram_compilers.tuning.sizes import OWN_BLOCKS, Blocks
from engram_compilers.values import Activation, Apart, Rows, Value
from engram_runtime.errors import CompileError
from engram_runtime.executor import FLOAT16, FLOAT32
from engram_runtime.library import batch_function, pass_function
from engram_runtime.manifest import DECODER, ROWS, GraphSpec, StateSpec

Graphs = Mapping[str, tuple[OnnxModel, GraphSpec]]

CONVERTERS: Converters = {
    **STANDARD_CONVERTERS,
    **SUM_CONVERTERS,
    **KERNEL_CONVERTERS,
    **ATTENTION_CONVERTERS,
    **EXPERT_CONVERTERS,
    **RECURRENT_CONVERTERS,
    **STREAM_CONVERTERS,
}


@dataclass(frozen=True, slots=True, eq=False)
class LoweredGraphs:
    """A module and what its caller must know of it.

    Attributes:
        expert_bytes: the bytes of one expert of each layer that has them, in graph order.
        float16_states: names of the states that are float16; the others are float32.
        graph_tensors: by graph, which of the packed tensors its functions take, by their places.
    """

    module: tvm.IRModule
    expert_bytes: tuple[int, ...]
    float16_states: tuple[str, ...]
    graph_tensors: dict[str, tuple[int, ...]]


def lower(
    graphs: Graphs,
    packed: PackedWeights,
    *,
    family: str,
    passes: Sequence[tuple[int, int]],
    batches: Sequence[int] = (),
    cache_dtype: str = FLOAT32,
    blocks: Blocks = OWN_BLOCKS,
) -> LoweredGraphs:
    """Lower every graph, for every (tokens, rows of logits) of ``passes``, to a `pass_function`.

    The functions take the graph's inputs, its states, which they update in place, then tensors of ``packed``.
    They return the graph's outputs, the windows and recurrent states, and of each layer with experts how many it has
    read.
    The decoder is lowered to a `batch_function` for each count of ``batches`` too: a token and a position of each
    sequence, then the states of the first one, the second one, ...
    Keys and values of attention are kept in ``cache_dtype``. Linear layers are cut as ``blocks`` say.

    Args:
        graphs: by name, the decoder first; kernels and weights of the same name are shared.

    Raises:
        CompileError: an operator, or a use of one, that has no lowering.
    """
    builder = relax.BlockBuilder()
    linear, expert_linear = (
        importlib.import_module(f"engram_compilers.kernels.{name}") for name in (family, f"{family}_experts")
    )
    kernels = KernelCache(builder, blocked(linear, blocks), expert_linear, shared_kernels(family))
    lowered = {
        name: _lower_graph(model, spec, packed, kernels, _functions(name, passes, batches), cache_dtype)
        for name, (model, spec) in graphs.items()
    }
    return LoweredGraphs(
        module=builder.get(),
        expert_bytes=tuple(read.expert_bytes for graph in lowered.values() for read in graph.reads),
        float16_states=tuple(state for graph in lowered.values() for state in graph.float16_states),
        graph_tensors={name: graph.tensors for name, graph in lowered.items()},
    )


@dataclass(frozen=True, slots=True, eq=False)
class _LoweredGraph:
    reads: list[ExpertRead]
    float16_states: tuple[str, ...]
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What a function is lowered for; with several sequences there is a token and a row of logits of each."""

    tokens: int
    rows: int
    sequences: int = 1


def _functions(graph: str, passes: Sequence[tuple[int, int]], batches: Sequence[int]) -> dict[str, _Sizes]:
    """Return the functions a graph is lowered to, by name."""
    functions = {pass_function(graph, tokens, rows): _Sizes(tokens, rows) for tokens, rows in passes}
    if graph == DECODER:
        functions |= {batch_function(count): _Sizes(count, count, count) for count in batches}
    return functions


def _lower_graph(
    model: OnnxModel,
    spec: GraphSpec,
    packed: PackedWeights,
    kernels: KernelCache,
    functions: Mapping[str, _Sizes],
    cache_dtype: str,
) -> _LoweredGraph:
    reads: list[ExpertRead] = []
    spec, narrow = _with_caches(model, spec, cache_dtype)
    weights = WeightArguments(packed)
    for name, sizes in functions.items():
        weights = WeightArguments(packed)
        reads = _lower_pass(name, model, spec, weights, kernels, sizes)
    places = {tensor: place for place, tensor in enumerate(packed.tensors)}
    return _LoweredGraph(reads, narrow, tuple(places[tensor] for tensor in weights.variables))


def _with_caches(model: OnnxModel, spec: GraphSpec, dtype: str) -> tuple[GraphSpec, tuple[str, ...]]:
    """Return the interface with keys and values of attention in ``dtype``, and the states that are float16 by it."""
    places = [(node, place) for node in model.nodes for place in CACHE_INPUTS.get(node.operator, ())]
    caches = {node.inputs[place] for node, place in places if node.has(place)}
    states = tuple(replace(state, dtype=dtype) if state.name in caches else state for state in spec.states)
    return replace(spec, states=states), tuple(state.name for state in states if state.dtype == FLOAT16)


def _lower_pass(
    name: str, model: OnnxModel, spec: GraphSpec, weights: WeightArguments, kernels: KernelCache, sizes: _Sizes
) -> list[ExpertRead]:
    builder = kernels.builder
    forward = ForwardPass(kernels, weights, model)
    arguments = _define_inputs(forward, spec, sizes)
    # The virtual machine checks the arguments before the weights in each call; weights were mapped to their shapes.
    with builder.function(name, attrs={"num_input": len(arguments)}):
        with builder.dataflow():
            if sizes.sequences > 1:
                positions = _activation(forward, POSITION)
                forward.set(POSITION, Apart(tuple(split_rows(forward, positions)), positions))
            for node in model.nodes:
                _convert(forward, node)
            updated = [(state, value) for state in spec.states for value in _updated(forward, state)]
            returned = [value for state, value in updated if not state.rolls_back]
            computed = [_activation(forward, name) for name in ("logits", *spec.told_outputs)]
            results = [value.expr for value in (*computed, *returned)]
            results += [read.count for read in forward.expert_reads]
            outputs = [builder.emit_output(result) for result in results]
        builder.emit_func_output(relax.Tuple(outputs), [*arguments, *weights.variables.values()])
    return forward.expert_reads


def _define_inputs(forward: ForwardPass, spec: GraphSpec, sizes: _Sizes) -> list[relax.Var]:
    """Make the function's arguments in manifest order, with T and R fixed; states once for each sequence."""
    axes = {"T": sizes.tokens, "R": sizes.rows}
    inputs = []
    for tensor in spec.inputs:
        shape = tuple(axes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
        whole = (sizes.sequences,) if tensor.name == POSITION else shape
        inputs.append(_argument(tensor.name, whole, tensor.dtype))
        forward.set(tensor.name, inputs[-1])
    states = [
        [_argument(f"{state.name}.{index}", state.shape, state.dtype) for state in spec.states]
        for index in range(sizes.sequences)
    ]
    for state, of in zip(spec.states, zip(*states, strict=True), strict=True):
        forward.set(state.name, Apart(of) if sizes.sequences > 1 else of[0])
    sites = [tensor.name for tensor in spec.inputs if tensor.name.startswith(ROWS)]
    forward.pending_rows = {name: (index, _activation(forward, name)) for index, name in enumerate(sites)}
    return [argument.expr for argument in (*inputs, *itertools.chain.from_iterable(states))]


def _argument(name: str, shape: tuple[int, ...], dtype: str) -> Activation:
    return Activation(relax.Var(name.replace(".", "_"), relax.TensorType(shape, dtype)), shape, dtype)


def _convert(forward: ForwardPass, node: Node) -> None:
    if node.operator not in CONVERTERS:
        raise CompileError(f"operator {node.operator} has no lowering; there are {sorted(CONVERTERS)}")
    if node.operator in forward.kernels.shared.lacking:
        raise CompileError(f"operator {node.operator} has no kernel for GPUs; compile for a processor: --target native")
    SIGNATURES[node.operator].check(node)
    if undefined := [name for name in node.inputs if name and not forward.is_defined(name)]:
        raise CompileError(f"{node.operator} takes {undefined}, which no node before it makes; export the bundle again")
    forward.await_rows(node)
    convert = CONVERTERS[node.operator]
    if takes_apart(forward, node):
        convert = BATCH_CONVERTERS.get(node.operator, partial(convert_apart, CONVERTERS[node.operator]))
    values = convert(forward, node)
    if len(values) != len(node.outputs):
        raise CompileError(
            f"{node.operator} has outputs {list(node.outputs)}, its lowering makes {len(values)} of them"
        )
    for name, value in zip(node.outputs, values, strict=True):
        forward.set(name, value)


def _updated(forward: ForwardPass, state: StateSpec) -> list[Activation]:
    """Return a state's next contents, of each sequence, which a kernel has put in its place."""
    following = [_computed(forward, f"next.{state.name}", value) for value in _each(forward, f"next.{state.name}")]
    current = [_computed(forward, state.name, value) for value in _each(forward, state.name)]
    if not all(forward.is_held_in(*pair) for pair in zip(following, current, strict=True)):
        raise CompileError(
            f"next.{state.name} is not {state.name} changed in place by a kernel; export the bundle again"
        )
    return following


def _each(forward: ForwardPass, name: str) -> Sequence[Value]:
    value = _defined(forward, name)
    return value.of if isinstance(value, Apart) else [value]


def _activation(forward: ForwardPass, name: str) -> Activation:
    return _computed(forward, name, _defined(forward, name))


def _defined(forward: ForwardPass, name: str) -> Value:
    if not forward.is_defined(name):
        raise CompileError(f"the graph computes no {name}; export the bundle again")
    return forward.get(name)


def _computed(forward: ForwardPass, name: str, value: Value) -> Activation:
    if not isinstance(value, Rows):
        raise CompileError(f"{name} of the graph is {value!r}, which no kernel computes; export the bundle again")
    return forward.materialise(value)
