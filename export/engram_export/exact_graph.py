"""A bundle's graph run by onnxruntime with activations left in float32, in memory that does not grow with its weights.

Weights stay in the file, which onnxruntime maps: nothing is packed anew, nothing is folded, and a quantised layer is
decoded to float32 a slice at a time. Slow, but the graph's own arithmetic without the rounding of an executor.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from engram_compilers.onnx_model import load_onnx
from engram_export.moe_operators import keep_float_activations
from engram_export.weight_map import row_slices
from engram_runtime.bundle import Bundle
from engram_runtime.draft_head import Drafted, DraftHead
from engram_runtime.errors import BundleError
from engram_runtime.executors.onnxruntime_session import REFUSALS, OnnxRuntimeExecutor
from engram_runtime.onnx_places import check_places
from engram_runtime.session import UNLOADED, Session, close_sites, open_sites


@dataclass(frozen=True, slots=True, eq=False)
class GraphLogits:
    """What a graph gives for a text: the best token at every position ``[T]`` and the last logits ``[R, V]``.

    Beside a draft head, ``hidden [T, D]`` is what it goes on from.
    """

    argmax: NDArray[np.int64]
    last: NDArray[np.float32]
    hidden: NDArray[np.float32]


def exact_logits(bundle: Bundle, token_ids: NDArray[np.int64], *, rows: int, threads: int) -> GraphLogits:
    """Run a bundle's decoder over ``[T]`` token ids, ``rows`` of them at a time, which are the logits in memory."""
    executor = open_exact_executor(bundle, threads)
    logits, argmax, hidden = np.empty((0, 0), dtype=np.float32), [], []
    with contextlib.ExitStack() as opened:
        sites = open_sites(bundle, UNLOADED)
        opened.callback(close_sites, sites)
        sequence = opened.enter_context(Session(bundle, executor, sites))
        first = len(token_ids) % rows  # the last rows are then those of one step
        for part in np.split(token_ids, range(first, len(token_ids), rows)):
            if len(part):
                logits = sequence.decode(part.tolist())
                argmax.append(logits.argmax(axis=1))
                hidden.append(sequence.hidden)
    return GraphLogits(np.concatenate(argmax), logits, np.concatenate(hidden))


def exact_drafts(
    bundle: Bundle, token_ids: NDArray[np.int64], hidden: NDArray[np.float32], *, rows: int, threads: int
) -> GraphLogits:
    """Run a bundle's draft head over ``[T]`` token ids, each after a position with ``hidden [T, D]``; likewise."""
    head = DraftHead(bundle, open_exact_executor(bundle, threads))
    drafted, argmax = Drafted(np.empty((0, 0), dtype=np.float32), hidden[:0]), []
    places = range(len(token_ids) % rows, len(token_ids), rows)
    for part, states in zip(np.split(token_ids, places), np.split(hidden, places), strict=True):
        if len(part):
            drafted = head.extend(part.tolist(), states, every_row=True)
            argmax.append(drafted.logits.argmax(axis=1))
    return GraphLogits(np.concatenate(argmax), drafted.logits, drafted.hidden)


def open_exact_executor(bundle: Bundle, threads: int) -> OnnxRuntimeExecutor:
    """Open a bundle's graphs as `open_exact_graph` does."""

    def open_graph(name: str) -> ort.InferenceSession:
        graph = bundle.manifest.graph(name)
        check_places(bundle.file(graph.file), bundle.file(graph.weights))
        return open_exact_graph(bundle.file(graph.file), threads=threads)

    return OnnxRuntimeExecutor(open_graph, threads)


def open_exact_graph(path: Path, *, threads: int) -> ort.InferenceSession:
    """Open a graph whose weights stand in a file beside it.

    Raises:
        BundleError: it is not an ONNX graph, or onnxruntime refuses it.
    """
    model = load_onnx(path)
    keep_float_activations(model.graph)
    graph = model.graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    used = [node for node in graph.node if not read.isdisjoint(node.output)]  # the others would run all the same
    parts = [part for node in used for part in _float_nodes(node, graph)]
    del graph.node[:]
    graph.node.extend(parts)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],  # it would decode and transpose weights into memory
        )
    except REFUSALS as error:
        raise BundleError(f"onnxruntime {ort.__version__} refuses {path}: {error}") from error


def _float_nodes(node: onnx.NodeProto, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield a node that leaves activations in float32, or nodes that compute it a slice of its outputs at a time."""
    kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if node.op_type != "MatMulNBits":
        yield node
        return
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in kept}
    slices = row_slices((values["N"], values["K"]))
    if len(slices) == 1:
        yield node
        return
    outputs = [f"{node.output[0]}.{start}" for start, _ in slices]
    for output, (start, stop) in zip(outputs, slices, strict=True):
        inputs = [f"{output}.{index}" for index in range(1, len(node.input))]
        for whole, part in zip(node.input[1:], inputs, strict=True):
            yield from _rows(graph, whole, part, start, stop)
        sizes = {**values, "N": stop - start}
        yield helper.make_node(node.op_type, [node.input[0], *inputs], [output], domain=node.domain, **sizes)
    yield helper.make_node("Concat", outputs, list(node.output), axis=-1)


def _rows(graph: onnx.GraphProto, whole: str, part: str, start: int, stop: int) -> Iterator[onnx.NodeProto]:
    """Name rows of a tensor ``part``: of a weight, which stays in its file, or by nodes that slice what is computed."""
    weight = next((tensor for tensor in graph.initializer if tensor.name == whole), None)
    if weight is None:
        bounds = {f"{part}.start": start, f"{part}.stop": stop, f"{part}.axis": 0}
        for name, value in bounds.items():
            yield helper.make_node("Constant", [], [name], value_ints=[value])
        yield helper.make_node("Slice", [whole, *bounds], [part])
        return
    place = {entry.key: entry.value for entry in weight.external_data}
    row_bytes = int(place["length"]) // weight.dims[0]
    rows = graph.initializer.add(name=part, data_type=weight.data_type, dims=[stop - start, *weight.dims[1:]])
    rows.data_location = onnx.TensorProto.EXTERNAL
    place |= {"offset": str(int(place["offset"]) + start * row_bytes), "length": str((stop - start) * row_bytes)}
    for key, text in place.items():
        rows.external_data.add(key=key, value=text)
