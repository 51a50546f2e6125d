"""A3: damaged ONNX files: as the compilers read them, as a box plans by them, and as onnxruntime opens them."""

import contextlib
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.faults.parsers_mutators import NUMBERS, TEXTS, blind
from tests.faults.parsers_survey import Parser, survey
from tests.faults.row import Outcome, Row
from tests.test_bundle import contents, manifest_json, write_bundle

from engram_compilers.onnx_model import read_onnx_model
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, CompileError
from engram_runtime.executors.onnxruntime_session import REFUSALS, load
from engram_runtime.manifest import Manifest
from engram_runtime.onnx_places import check_places
from engram_runtime.planning.onnx_nodes import node_numbers

WEIGHTS_FILE, ROWS_OF, COLUMNS = "weights.safetensors", 6, 4
WEIGHTS_BYTES = 64 + 4 * ROWS_OF * COLUMNS
PLACES = ("location", "offset", "length", "checksum", "__class__", "")
PATHS = ("../weights.safetensors", "/etc/passwd", "/dev/zero", "weights.safetensors/", "./weights.safetensors", *TEXTS)


@cache
def sound_graph() -> bytes:
    """Return a graph that adds rows of an outer weight to a product, with a branch and constants inside."""
    outer = onnx.TensorProto(name="outer", data_type=TensorProto.FLOAT, dims=[ROWS_OF, COLUMNS])
    outer.data_location = TensorProto.EXTERNAL
    place = {"location": WEIGHTS_FILE, "offset": "64", "length": str(4 * ROWS_OF * COLUMNS)}
    for key, value in place.items():
        outer.external_data.add(key=key, value=value)
    inner = numpy_helper.from_array(np.eye(COLUMNS, dtype=np.float32), "inner")
    typed = helper.make_tensor("typed", TensorProto.INT64, [2], [0, 3])
    value = helper.make_tensor("value", TensorProto.FLOAT, [COLUMNS], np.arange(COLUMNS, dtype=np.float32).tolist())
    nodes = [
        helper.make_node("Gather", ["outer", "ids"], ["rows"], axis=0),
        helper.make_node("MatMul", ["rows", "inner"], ["product"]),
        helper.make_node("Constant", [], ["shift"], value=value),
        helper.make_node("Gather", ["outer", "typed"], ["two"], axis=0),
        helper.make_node("ReduceSum", ["two"], ["sum"], keepdims=0),
        helper.make_node("Add", ["product", "shift"], ["shifted"]),
        helper.make_node("Add", ["shifted", "sum"], ["logits"]),
    ]
    nodes[1].metadata_props.add(key="layer", value="layers.0")
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["T"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", COLUMNS])],
        [outer, inner, typed],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def damaged(rng: random.Random) -> bytes:
    """Return a damaged graph: one to three facts of its messages changed, or bytes of it."""
    if rng.random() < 0.4:
        return blind(rng, sound_graph())
    model = onnx.ModelProto.FromString(sound_graph())
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(CHANGES)(rng, model.graph)
    data = bytes(model.SerializeToString())
    return blind(rng, data) if rng.random() < 0.15 else data


def _int64(rng: random.Random) -> int:
    return rng.choice([number for number in NUMBERS if -(2**63) <= number < 2**63])


def _text(rng: random.Random) -> str:
    return rng.choice([text for text in TEXTS if text != "\ud800"])


def _tensor(rng: random.Random, tensor: onnx.TensorProto) -> None:
    match rng.randrange(7):
        case 0:
            tensor.data_type = rng.choice((*range(28), 2**31 - 1))
        case 1:
            del tensor.dims[:]
            tensor.dims.extend(_int64(rng) for _ in range(rng.choice((0, 1, 2, 9, 40))))
        case 2 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = _int64(rng)
        case 3:
            tensor.data_location = rng.choice((TensorProto.DEFAULT, TensorProto.EXTERNAL))
        case 4:
            tensor.raw_data = rng.randbytes(rng.choice((0, 1, 7, 64, 4096)))
        case 5:
            tensor.name = rng.choice(("inner", "ids", _text(rng)))
        case _:
            _place(rng, tensor)


def _place(rng: random.Random, tensor: onnx.TensorProto) -> None:
    if tensor.external_data and rng.random() < 0.7:
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice((str(rng.choice(NUMBERS)), _path(rng), "٣", "1_0", " 64", "64.0"))
        if rng.random() < 0.3:
            entry.key = rng.choice(PLACES)
    else:
        tensor.external_data.add(key=rng.choice(PLACES), value=_path(rng))


def _path(rng: random.Random) -> str:
    return rng.choice([path for path in PATHS if path != "\ud800"])


def _initializer(rng: random.Random, graph: onnx.GraphProto) -> None:
    if graph.initializer:
        _tensor(rng, rng.choice(graph.initializer))


def _added(rng: random.Random, graph: onnx.GraphProto) -> None:
    if graph.initializer:
        graph.initializer.add().CopyFrom(rng.choice(graph.initializer))
    if graph.node:
        graph.node.add().CopyFrom(rng.choice(graph.node))


def _removed(rng: random.Random, graph: onnx.GraphProto) -> None:
    fields = [each for each in (graph.node, graph.initializer, graph.input, graph.output) if each]
    if fields:
        field = rng.choice(fields)
        del field[rng.randrange(len(field))]


def _node(rng: random.Random, graph: onnx.GraphProto) -> None:
    if not graph.node:
        return
    node = rng.choice(graph.node)
    match rng.randrange(6):
        case 0:
            node.op_type = rng.choice(("MatMulNBits", "Loop", "If", "Reshape", "Gather", "Identity", _text(rng)))
        case 1:
            node.domain = rng.choice(("com.microsoft", "engram", _text(rng)))
        case 2 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(("outer", "inner", "logits", "ids", _text(rng)))
        case 3 if node.output:
            node.output[0] = rng.choice(("outer", "rows", "logits", _text(rng)))
        case 4:
            del node.input[:]
        case _:
            _attribute(rng, node)


def _attribute(rng: random.Random, node: onnx.NodeProto) -> None:
    attribute = rng.choice(node.attribute) if node.attribute else node.attribute.add(name="axis")
    attribute.type = rng.choice((*range(15),))
    if rng.random() < 0.5:
        attribute.i = _int64(rng)
        attribute.name = rng.choice(("axis", "keepdims", "value", _text(rng)))
    else:
        attribute.t.CopyFrom(onnx.TensorProto(data_type=1, dims=[2], raw_data=b"1234567"))
        _tensor(rng, attribute.t)


CHANGES: Sequence[Callable[[random.Random, Any], None]] = (
    *(_initializer, _initializer, _initializer, _added, _removed, _node, _node),
)


def _use_onnx(path: Path) -> None:
    """Read a graph as the compilers do, every weight of it, and as a plan does."""
    weights = path.parent / WEIGHTS_FILE
    if not weights.exists():
        weights.write_bytes(bytes(WEIGHTS_BYTES))
    with contextlib.suppress(BundleError):
        node_numbers(path, ("Gather",), "axis")
    with contextlib.suppress(BundleError):
        check_places(path, weights)
    model = read_onnx_model(path, weights)
    for weight in model.weights.values():
        float(model.read(weight).astype(np.float32).sum())


def _use_onnxruntime(path: Path) -> None:
    """Have onnxruntime open a bundle's decoder, and run it where it looks like the sound one."""
    folder = path.parent / "bundle"
    if not folder.exists():
        write_bundle(folder)
        (folder / "graph" / WEIGHTS_FILE).write_bytes(bytes(WEIGHTS_BYTES))
    bundle = Bundle(folder, Manifest.from_dict(manifest_json(contents())))
    (folder / "graph" / "decoder.onnx").write_bytes(path.read_bytes())
    session = load(bundle, threads=1, target=None)._session("decoder")
    names = [value.name for value in session.get_inputs()]
    try:
        session.run(None, {name: np.array([0, ROWS_OF - 1], dtype=np.int64) for name in names})
    except REFUSALS as error:
        raise BundleError(str(error)) from error


ONNX = Parser(
    name="onnx",
    damaged=damaged,
    use=_use_onnx,
    refusals=(BundleError, CompileError),
    sound=sound_graph(),
    file="decoder.onnx",
)
ONNXRUNTIME = Parser(
    name="onnxruntime", damaged=damaged, use=_use_onnxruntime, refusals=(BundleError,), sound=sound_graph()
)


def graphs(count: int) -> Outcome:
    """Damage ONNX files as the compilers read them."""
    return survey((ONNX, count))


def sessions(count: int) -> Outcome:
    """Damage ONNX files that onnxruntime opens."""
    return survey((ONNXRUNTIME, count))


ROWS = (
    Row(
        name="A3 onnx",
        fault="an ONNX file with damaged tensors, places, attributes, nodes or bytes, as the compilers read it",
        expected="BundleError or CompileError, or every weight read; at most 1 s and 64 MiB",
        quick=10_000,
        full=400_000,
        run=graphs,
    ),
    Row(
        name="A3 onnxruntime",
        fault="such a file opened and run by onnxruntime, in children",
        expected="BundleError, or values; at most 1 s and 64 MiB; no child dies",
        quick=10_000,
        full=100_000,
        run=sessions,
    ),
)
