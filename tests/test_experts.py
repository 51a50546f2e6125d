"""Mixtures of experts: eager, in onnxruntime and in compiled kernels they are one function, and read what they must."""

import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import pytest
import torch
import tvm
from numpy.typing import NDArray
from tests.steps import ready_rows
from tests.test_kernels import HAS_VNNI, floats, same_bits
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from tvm import relax

from engram_compilers.kernels import (
    loops,
)
from engram_compilers.linking import link
from engram_compilers.lowering import lower
from engram_compilers.onnx_model import read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_export.experts import (
    ExpertFactory,
    Experts,
    FloatExpertLinear,
    Int4ExpertLinear,
    Int8ExpertLinear,
)
from engram_export.linear import FloatLinear, Int4Linear, Int8Linear
from engram_export.moe_operators import FloatExperts, QuantisedExperts, keep_float_activations, mix_experts
from engram_export.onnx_functions import add_functions
from engram_runtime.bundle import file_sha256
from engram_runtime.cpu import machine
from engram_runtime.errors import CheckpointError, CompileError
from engram_runtime.executor import StepInputs
from engram_runtime.executors.tvm_library import TvmExecutor
from engram_runtime.library import LibraryInfo
from engram_runtime.manifest import DECODER, GraphSpec, TensorSpec

Array = NDArray[Any]

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 9, 7, 64, 96, 3
FORMATS: dict[str, ExpertFactory] = {
    "float32": FloatExpertLinear,
    "int8": Int8ExpertLinear,
    "int4": Int4ExpertLinear,
}


# The torch module


class Block(nn.Module):
    """A router and its experts, which is all of a model these tests need."""

    def __init__(self, make_expert_linear: ExpertFactory, *, normalise: bool) -> None:
        super().__init__()
        self.router = FloatLinear("router", HIDDEN, EXPERTS)
        self.experts = Experts(
            "layers.0",
            EXPERTS,
            HIDDEN,
            INTERMEDIATE,
            top_k=TOP_K,
            normalise=normalise,
            make_expert_linear=make_expert_linear,
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.experts(x, self.router(x))
        return mixed


def block(label: str, *, normalise: bool = True) -> Block:
    """Return a block with random weights, encoded two experts at a time."""
    made = Block(FORMATS[label], normalise=normalise)
    state = {"router.weight": floats(EXPERTS, HIDDEN)}
    for name, shape in (("gate_up", (2 * INTERMEDIATE, HIDDEN)), ("down", (HIDDEN, INTERMEDIATE))):
        state |= encoded(made.experts, name, floats(EXPERTS, *shape, seed=len(name)) / np.float32(8))
    made.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return made.requires_grad_(False)


def encoded(module: Experts, name: str, weight: Array) -> dict[str, Array]:
    layer: FloatExpertLinear = getattr(module, name)
    slices = [layer.encode(weight[start : start + 2]) for start in range(0, len(weight), 2)]
    return {f"experts.{name}.{part}": np.concatenate([piece[part] for piece in slices]) for part in slices[0]}


def eager(module: Block, x: Array) -> Array:
    found: Array = module(torch.from_numpy(x)).numpy()
    return found


def reference_block(name: str) -> Any:
    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    if name == "mixtral":
        config: Any = MixtralConfig(**sizes, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
        return MixtralSparseMoeBlock(config)
    config = Qwen3MoeConfig(
        **sizes,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        norm_topk_prob=name == "qwen3_moe normalised",
    )
    return Qwen3MoeSparseMoeBlock(config)


@pytest.mark.parametrize("name", ["qwen3_moe normalised", "qwen3_moe", "mixtral"])
def test_experts_compute_what_transformers_does(name: str) -> None:
    reference = reference_block(name).requires_grad_(False)
    for index, parameter in enumerate(reference.parameters()):
        parameter.copy_(torch.from_numpy(floats(*parameter.shape, seed=index) / np.float32(8)))
    ours = Block(FloatExpertLinear, normalise=name != "qwen3_moe").requires_grad_(False)
    state = {"router.weight": reference.gate.weight.numpy()}
    state |= encoded(ours.experts, "gate_up", reference.experts.gate_up_proj.numpy())
    state |= encoded(ours.experts, "down", reference.experts.down_proj.numpy())
    ours.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    x = floats(TOKENS, HIDDEN)
    expected = reference(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(eager(ours, x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layer", "linear"), [(Int8ExpertLinear, Int8Linear), (Int4ExpertLinear, Int4Linear)])
def test_an_experts_rows_are_those_of_the_linear_layer_gate_and_up_in_turn(layer: Any, linear: Any) -> None:
    weight = floats(2, 6, 64)
    found = layer("w", 2, 64, 6, 2).encode(weight)
    expected = linear("w", 64, 6).encode(weight[1][[0, 3, 1, 4, 2, 5]])
    assert [same_bits(found[part][1], array.reshape(found[part][1].shape)) for part, array in expected.items()] == [
        True
    ] * len(expected)


@pytest.mark.parametrize("label", ["int8", "int4"])
def test_inputs_that_are_not_whole_blocks_are_refused(label: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        FORMATS[label]("layers.0.down", 4, 48, 64, 1)
    assert str(caught.value) == (
        "layers.0.down has 48 inputs, quantised weights need a multiple of 32; export with --quant none"
    )


def test_of_equal_logits_the_lower_expert_comes_first() -> None:
    down = torch.eye(4)[:, :, None]  # expert e writes to output e alone
    weights = FloatExperts(weight=torch.ones(4, 2, 4)), FloatExperts(weight=down)
    mixed = mix_experts(torch.ones(1, 4), torch.zeros(1, 4), *weights, top_k=2, normalise=True)
    assert mixed[0].nonzero().flatten().tolist() == [0, 1]


# onnxruntime


@cache
def graph(label: str, normalise: bool) -> onnx.ModelProto:
    """Trace a block whose weights are not constants yet, as an export does, then put them in."""
    module = block(label, normalise=normalise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dynamic = ({0: torch.export.Dim("T")},)
        program = torch.export.export(module, (torch.ones(5, HIDDEN),), dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(program, dynamo=True, opset_version=23, optimize=False, verbose=False)
    assert exported is not None
    initialisers = exported.model.graph.initializers
    values = {name: initialisers[name].const_value for name, _ in module.named_parameters()}
    for name in values:
        initialisers[name].const_value = None
    onnxscript.optimizer.optimize(exported.model)
    add_functions(exported.model)
    for name, value in values.items():
        initialisers[name].const_value = value
    exported.model.graph.outputs[0].name = "logits"
    exported.model.graph.inputs[0].name = "rows.x"
    return ir.to_proto(exported.model)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def in_onnxruntime(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"rows.x": x})[0]
    return found


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("label", FORMATS)
def test_onnxruntime_computes_the_eager_block(label: str, normalise: bool) -> None:
    exact = copied(graph(label, normalise))
    keep_float_activations(exact.graph)
    x = floats(TOKENS, HIDDEN)
    expected = eager(block(label, normalise=normalise), x)
    np.testing.assert_allclose(in_onnxruntime(exact, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", ["int8", "int4"])
def test_onnxruntime_rounds_activations_of_quantised_experts_to_8_bits(label: str) -> None:
    """Each activation is off by up to 0.4 % of its block's largest; over two layers 1.5 % of the output's largest."""
    x = floats(TOKENS, HIDDEN)
    expected = eager(block(label), x)
    difference = np.abs(in_onnxruntime(graph(label, True), x) - expected).max()
    assert 1e-4 < difference < 0.03 * np.abs(expected).max()


def test_a_node_holds_weights_of_one_format() -> None:
    down = QuantisedExperts(
        codes=torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.uint8),
        scales=torch.ones(EXPERTS, HIDDEN, 3),
        zeros=None,
        bits=8,
    )
    weights = FloatExperts(weight=torch.ones(EXPERTS, 2 * INTERMEDIATE, HIDDEN)), down

    class Mixed(nn.Module):
        def forward(self, x: Tensor, logits: Tensor) -> Tensor:
            return mix_experts(x, logits, *weights, top_k=2, normalise=True)

    with pytest.raises(TypeError, match=r"^gate_up and down of experts are stored in two formats, one node holds one"):
        torch.export.export(Mixed(), (torch.ones(2, HIDDEN), torch.ones(2, EXPERTS)), strict=False)


# Compiled graphs

COMPILED_TOKENS = (1, TOKENS)
PADDED_WEIGHTS = 2 * INTERMEDIATE * HIDDEN + HIDDEN * 128  # of an expert, the 96 inputs of down padded to 128
SCALE_BYTES = 4 * (2 * INTERMEDIATE + HIDDEN)
EXPERT_BYTES = {
    "float32": 4 * 3 * INTERMEDIATE * HIDDEN,
    "int8": PADDED_WEIGHTS + SCALE_BYTES,
    "int4": PADDED_WEIGHTS // 2 + PADDED_WEIGHTS // 32 + SCALE_BYTES,
}


@dataclass(frozen=True)
class Library:
    """A compiled block."""

    executor: TvmExecutor
    expert_bytes: int

    def __call__(self, x: Array, *, threads: int = 2) -> Array:
        self.executor.threads = threads
        nothing = np.zeros(1, np.int64)
        token_ids = np.zeros(len(x), np.int64)
        inputs = StepInputs(token_ids=token_ids, position=0, logit_rows=nothing, rows={"x": ready_rows(x)})
        return self.executor.bind({})(inputs)


def graph_spec() -> GraphSpec:
    """Return the interface an executor expects, around the block's one input and output."""
    shapes: list[tuple[str, str, tuple[int | str, ...]]] = [
        ("token_ids", "int64", ("T",)),
        ("position", "int64", (1,)),
        ("logit_rows", "int64", ("R",)),
        ("rows.x", "float32", ("T", HIDDEN)),
    ]
    inputs = tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in shapes)
    output = TensorSpec(name="logits", dtype="float32", shape=("T", HIDDEN))
    return GraphSpec(file="g.onnx", weights="w.bin", inputs=inputs, outputs=(output,), states=())


def compiled(folder: Path, model: onnx.ModelProto, family: str) -> Library:
    """Compile a graph, all kernels in parallel."""
    onnx.save_model(copied(model), folder / "g.onnx", save_as_external_data=True, location="w.bin", size_threshold=128)
    passes = tuple((tokens, 1) for tokens in COMPILED_TOKENS)
    with pytest.MonkeyPatch.context() as patch, PackedWeights(folder / "packed.bin") as packed:
        patch.setattr(loops, "PARALLEL_FROM_US", 0.0)
        onnx_model = read_onnx_model(folder / "g.onnx", folder / "w.bin")
        lowered = lower({DECODER: (onnx_model, graph_spec())}, packed, family=family, passes=passes)
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    executable = relax.build(lowered.module, target, relax_pipeline=relax.get_default_pipeline(target))
    executable.export_library(str(folder / "model.so"), fcompile=partial(link, mtriple=f"{machine()}-linux-gnu"))
    info = LibraryInfo(
        target="here",
        device="cpu",
        machine="",
        cpu_flags=(),
        graph_sha256="",
        compiler="",
        ffi="",
        library="model.so",
        runtime="",
        weights="packed.bin",
        commands=None,
        weights_bytes=packed.bytes,
        sha256={"library": file_sha256(folder / "model.so")},
        passes=passes,
        batches=(),
        tensors=tuple(packed.tensors.values()),
        graph_tensors=lowered.graph_tensors,
        expert_bytes=lowered.expert_bytes,
        threads=0,
        float16_states=(),
    )
    (expert_bytes,) = lowered.expert_bytes
    return Library(TvmExecutor(folder, info, threads=2), expert_bytes)


CASES = {
    "float": ("float32", True, "portable"),
    "int8": ("int8", True, "portable"),
    "int8-shares": ("int8", False, "portable"),
    "int8-vnni": ("int8", True, "avx512_vnni"),
    "int4": ("int4", True, "portable"),
    "int4-vnni": ("int4", True, "avx512_vnni"),
}


@pytest.fixture(scope="module", params=CASES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Block, Library]:
    label, normalise, family = CASES[request.param]
    if family == "avx512_vnni" and not HAS_VNNI:
        pytest.skip("this machine's /proc/cpuinfo lists no avx512_vnni")
    folder = tmp_path_factory.mktemp("library")
    return block(label, normalise=normalise), compiled(folder, graph(label, normalise), family)


def test_compiled_experts_compute_the_eager_block(library: tuple[Block, Library]) -> None:
    """Up to activations rounded to 16 bits, 0.003 % of a row's largest each."""
    module, run = library
    x = floats(TOKENS, HIDDEN)
    expected = eager(module, x)
    np.testing.assert_allclose(run(x), expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_any_tokens_at_once_and_any_threads_give_the_same_bits(library: tuple[Block, Library]) -> None:
    _, run = library
    x = floats(TOKENS, HIDDEN)
    one_by_one = np.concatenate([run(x[token : token + 1], threads=1) for token in range(TOKENS)])
    found = [same_bits(run(x[:tokens]), one_by_one[:tokens]) for tokens in COMPILED_TOKENS]
    assert found == [True] * len(COMPILED_TOKENS)


def test_the_executor_adds_up_the_bytes_of_the_experts_it_read(library: tuple[Block, Library]) -> None:
    module, run = library
    before = run.executor.expert_bytes_read
    x = floats(TOKENS, HIDDEN)
    distinct = 0
    for tokens in COMPILED_TOKENS:
        run(x[:tokens])
        logits = module.router(torch.from_numpy(x[:tokens])).numpy()
        distinct += len(np.unique(np.argsort(-logits, axis=1)[:, :TOP_K]))
    assert run.executor.expert_bytes_read - before == distinct * run.expert_bytes


def test_an_experts_bytes_are_its_share_of_the_packed_weights(library: tuple[Block, Library]) -> None:
    module, run = library
    assert run.expert_bytes == EXPERT_BYTES[str(module.experts.down.label)]


def changed(change: str) -> onnx.ModelProto:
    """Return the int8 graph with one thing about its experts changed."""
    model = copied(graph("int8", True))
    node = next(node for node in model.graph.node if node.op_type == "QMoE")
    attributes = {attribute.name: attribute for attribute in node.attribute}
    match change:
        case "activation":
            attributes["activation_alpha"].f = 1.7
        case "bias":
            node.input[4] = "experts.gate_up.scale"
        case "block":
            attributes["block_size"].i = 16
        case "bits":
            attributes["expert_weight_bits"].i = 4
        case "zeros":
            node.input[11] = "experts.gate_up.codes"
        case "weights":
            node.input[14] = node.input[1]
    return model


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "activation",
            "com.microsoft.QMoE has activation_alpha 1.7000000476837158, kernels need one of (1.0,)",
        ),
        ("bias", "com.microsoft.QMoE takes ['experts.gate_up.scale'], which has no lowering"),
        ("block", "com.microsoft.QMoE has block_size 16, kernels need one of (32,)"),
        (
            "bits",
            "com.microsoft.QMoE of experts.gate_up.codes has 4 bits, no zero points and "
            "ChannelScales, which is no known format",
        ),
        (
            "zeros",
            "com.microsoft.QMoE of experts.gate_up.codes has 8 bits, zero points and "
            "ChannelScales, which is no known format",
        ),
        ("weights", "com.microsoft.QMoE does not weigh experts by the softmax of its router's logits"),
    ],
)
def test_experts_the_kernels_do_not_know_are_refused(tmp_path: Path, change: str, expected: str) -> None:
    with pytest.raises(CompileError) as caught:
        compiled(tmp_path, changed(change), "portable")
    assert str(caught.value) == expected
