"""How many 8-bit planes a quantised layer takes its activations in is said by its node."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from tests.test_kernels import same_bits
from tests.tiny import TinyModel
from tests.workshop import Workshop, bundle_logits, copy_folder, random_ids, stepwise_logits, tiny_profile
from tvm import relax

from engram_compilers import build
from engram_compilers.lowering import lower
from engram_compilers.onnx_model import Node, OnnxModel, read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_compilers.signatures import PLANES_KEY, planes_of
from engram_runtime.bundle import Bundle
from engram_runtime.errors import CompileError
from engram_runtime.manifest import DECODER

LINEAR = "com.microsoft.MatMulNBits"


def linear(**metadata: str) -> Node:
    return Node(LINEAR, (), (), {}, {key.replace("_", "."): value for key, value in metadata.items()})


def test_a_layer_takes_two_planes_unless_its_node_says_one() -> None:
    assert [planes_of(linear()), planes_of(linear(engram_planes="1")), planes_of(linear(engram_planes="2"))] == [
        2,
        1,
        2,
    ]


@pytest.mark.parametrize("planes", ["0", "3", "one", ""])
def test_other_numbers_are_refused(planes: str) -> None:
    with pytest.raises(CompileError) as caught:
        planes_of(linear(engram_planes=planes))
    assert str(caught.value) == (
        f"com.microsoft.MatMulNBits has engram.planes {planes!r} in its metadata, kernels need '1' or '2'; "
        "export the bundle again"
    )


def test_metadata_is_read_from_the_file(workshop: Workshop, tmp_path: Path) -> None:
    decoder = workshop.uncompiled().manifest.decoder
    weights = workshop.uncompiled().file(decoder.weights)
    graph = onnx.load(workshop.uncompiled().file(decoder.file), load_external_data=False)
    (first, *_) = (node for node in graph.graph.node if node.op_type == "MatMulNBits")
    first.metadata_props.add(key=PLANES_KEY, value="1")
    onnx.save(graph, tmp_path / "graph.onnx")
    read = read_onnx_model(tmp_path / "graph.onnx", weights)
    planes = [planes_of(node) for node in read.nodes if node.operator == LINEAR]
    assert planes == [1] + [2] * (len(planes) - 1)


def with_one_plane(model: OnnxModel) -> OnnxModel:
    """Make every linear layer take one plane."""
    nodes = [dataclasses.replace(n, metadata={PLANES_KEY: "1"}) if n.operator == LINEAR else n for n in model.nodes]
    return dataclasses.replace(model, nodes=tuple(nodes))


@pytest.mark.parametrize("quant", [pytest.param("int8", marks=pytest.mark.exhaustive), "int4"])
def test_one_plane_is_coarser_and_tokens_at_once_are_tokens_one_by_one(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quant: str
) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel()), quant=quant)
    expected = bundle_logits(workshop.compiled(bundle), random_ids(20), "tvm")
    coarse = Bundle.open(copy_folder(bundle.path, tmp_path / "bundle"))
    monkeypatch.setattr(build, "read_onnx_model", lambda *files: with_one_plane(read_onnx_model(*files)))
    build.compile_bundle(coarse, tiny_profile(kernels="portable", decode_tokens=(1, 4), prefill_tokens=()))
    found = bundle_logits(coarse, random_ids(20), "tvm")
    assert same_bits(found, stepwise_logits(coarse, random_ids(20), "tvm"))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-4 < difference < 0.05  # a step of 8 bits is 1/127 of a row's peak


def kernel_names(bundle: Bundle, folder: Path) -> list[str]:
    """Return what a step of one token calls, in order, without sizes."""
    decoder = bundle.manifest.decoder
    model = read_onnx_model(bundle.file(decoder.file), bundle.file(decoder.weights))
    with PackedWeights(folder / "packed") as packed:
        module = lower({DECODER: (model, decoder)}, packed, family="portable", passes=[(1, 1)]).module
    module = relax.transform.DeadCodeElimination(["forward_1_1"])(module)  # attention's lengths, which kernels know
    values = [binding.value for block in module["forward_1_1"].body.blocks for binding in block.bindings]
    called = [value.args[0] for value in values if isinstance(value, relax.Call)]
    names = [kernel.name_hint for kernel in called if isinstance(kernel, tvm.ir.GlobalVar)]
    return ["_".join(part for part in name.split("_") if part.isidentifier()) for name in names]


def test_norms_sums_and_gates_are_part_of_the_kernel_that_quantises(workshop: Workshop, tmp_path: Path) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel()), quant="int8")
    attention = ["linear_int8", "rope_append_float32", "attend_None_float32", "quantise", "linear_int8"]
    feed_forward = ["add_norm_quantise", "linear_int8", "silu_quantise", "linear_int8"]
    assert kernel_names(bundle, tmp_path) == [
        *("embed_int8", "norm_quantise", *attention, *feed_forward),
        *("add_norm_quantise", *attention, *feed_forward),
        *("add", "norm_quantise", "linear_int8"),
    ]
