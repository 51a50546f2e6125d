"""Mixtures of experts: eager, in onnxruntime and in compiled kernels they are one function, and read what they must."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import pytest
import torch
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tests.test_kernels import HAS_VNNI, LEGAL_GROUPS, call, compile_kernels, same_bits
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from tvm import relax

from engram_compilers.kernels import (
    avx512_vnni_experts,
    experts,
    float_linear,
    loops,
    portable_experts,
    quantise,
)
from engram_compilers.kernels.experts import Routing
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
from engram_runtime.errors import CheckpointError, CompileError
from engram_runtime.executor import StepInputs
from engram_runtime.executors.tvm_library import TvmExecutor
from engram_runtime.library import LibraryInfo
from engram_runtime.manifest import GraphSpec, TensorSpec

Array = NDArray[Any]

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 9, 7, 64, 96, 3
FORMATS = [FloatExpertLinear, Int8ExpertLinear, Int4ExpertLinear]
FAMILIES = [
    pytest.param(portable_experts, id="portable"),
    pytest.param(
        avx512_vnni_experts,
        id="avx512_vnni",
        marks=pytest.mark.skipif(not HAS_VNNI, reason="this machine's processor has no avx512_vnni"),
    ),
]


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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


def block(make_expert_linear: ExpertFactory, *, normalise: bool = True) -> Block:
    """Return a block with random weights, encoded two experts at a time."""
    made = Block(make_expert_linear, normalise=normalise)
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


@pytest.mark.parametrize("layer", [Int8ExpertLinear, Int4ExpertLinear])
def test_inputs_that_are_not_whole_blocks_are_refused(layer: ExpertFactory) -> None:
    with pytest.raises(CheckpointError) as caught:
        layer("layers.0.down", 4, 48, 64, 1)
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
def graph(make_expert_linear: ExpertFactory, normalise: bool) -> onnx.ModelProto:
    """Trace a block whose weights are not constants yet, as an export does, then put them in."""
    module = block(make_expert_linear, normalise=normalise)
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
    for name, value in values.items():
        initialisers[name].const_value = value
    exported.model.graph.outputs[0].name = "logits"
    exported.model.graph.inputs[0].name = "rows.x"
    return ir.to_proto(exported.model)


def in_onnxruntime(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"rows.x": x})[0]
    return found


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("layer", FORMATS)
def test_onnxruntime_computes_the_eager_block(layer: ExpertFactory, normalise: bool) -> None:
    exact = onnx.ModelProto()
    exact.CopyFrom(graph(layer, normalise))
    keep_float_activations(exact.graph)
    x = floats(TOKENS, HIDDEN)
    expected = eager(block(layer, normalise=normalise), x)
    np.testing.assert_allclose(in_onnxruntime(exact, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", FORMATS[1:])
def test_onnxruntime_rounds_activations_of_quantised_experts_to_8_bits(layer: ExpertFactory) -> None:
    """Each activation is off by up to 0.4 % of its block's largest; over two layers 1.5 % of the output's largest."""
    x = floats(TOKENS, HIDDEN)
    expected = eager(block(layer), x)
    difference = np.abs(in_onnxruntime(graph(layer, True), x) - expected).max()
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


# Kernels


ROUTINGS = [Routing(1, 8, 2), Routing(5, 7, 3), Routing(3, 4, 4), Routing(64, 512, 10)]
OUTPUTS, INPUTS = 40, 96  # two whole tiles and one of 8 outputs; inputs are padded to 128


@cache
def routers() -> dict[Any, Any]:
    sizes = [(routing, normalise) for routing in ROUTINGS for normalise in (True, False)]
    return compile_kernels({size: experts.route(size[0], normalise=size[1]) for size in sizes})


def route(routing: Routing, logits: Array, *, normalise: bool = True) -> list[Array]:
    """Return order, expert, start, count and weight."""
    bounds = np.full(routing.segments + 1, -1, np.int32)
    outputs = [np.full(routing.pairs, -1, np.int32), bounds, bounds, np.zeros(1, np.int32)]
    weight = np.full((routing.tokens, routing.top_k), np.nan, np.float32)
    return call(routers()[routing, normalise], logits, *outputs, weight)[1:]


def chosen_experts(routing: Routing, logits: Array) -> Array:
    return np.argsort(-logits, axis=1, kind="stable")[:, : routing.top_k]


def stated_segments(chosen: Array) -> list[Array]:
    """Order, expert, start and count of pairs with these experts, without what follows the last segment."""
    experts_of_pairs = chosen.ravel()
    order = np.argsort(experts_of_pairs, kind="stable")
    expert, start = np.unique(experts_of_pairs[order], return_index=True)
    return [order, np.append(expert, expert[0]), np.append(start, len(order)), np.array([len(expert)])]


def assert_routed(routing: Routing, logits: Array, normalise: bool) -> None:
    chosen = chosen_experts(routing, logits)
    *found, weight = route(routing, logits, normalise=normalise)
    expected = stated_segments(chosen)
    assert [part[: len(stated)].tolist() for part, stated in zip(found, expected, strict=True)] == [
        part.tolist() for part in expected
    ]
    decay = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    of_chosen = np.take_along_axis(decay, chosen, axis=1)
    total = of_chosen if normalise else decay
    np.testing.assert_allclose(weight, of_chosen / total.sum(axis=1, keepdims=True), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: routing.name)
def test_pairs_are_ordered_by_expert_and_weighed_by_softmax(routing: Routing, normalise: bool) -> None:
    assert_routed(routing, 3 * floats(routing.tokens, routing.experts), normalise)


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, (5, 7), elements=st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.5, -80.0])), st.booleans())
def test_equal_logits_take_the_lower_expert(logits: Array, normalise: bool) -> None:
    assert_routed(ROUTINGS[1], logits, normalise)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_token_whose_logits_are_no_numbers_gets_weights_that_show_it(bad: float) -> None:
    logits = floats(5, 7)
    logits[2, 4] = bad
    weight = route(ROUTINGS[1], logits)[-1]
    assert np.isnan(weight).any(axis=1).tolist() == [False, False, True, False, False]


def test_more_experts_than_there_are_cannot_be_taken() -> None:
    with pytest.raises(CompileError) as caught:
        Routing(1, 4, 5)
    assert str(caught.value) == "every token takes 5 experts of 4, which can't be"


@dataclass(frozen=True)
class Layer:
    """A layer of all experts: its integer weight ``[E, N, K]``, and one expert packed by a family."""

    kind: str
    weight: Array
    scale: Array

    def packed(self, family: ModuleType) -> list[Array]:
        parts = [self.packed_expert(family, expert) for expert in range(EXPERTS)]
        return [np.concatenate([part[name] for part in parts]) for name in parts[0]]

    def packed_expert(self, family: ModuleType, expert: int) -> dict[str, Array]:
        found: dict[str, Array]
        if self.kind == "float":
            return float_linear.pack_float(self.weight[expert] * self.scale[expert][:, None])
        if self.kind == "int8":
            codes = (self.weight[expert] + 128).astype(np.uint8)
            found = family.pack_expert_int8(codes, self.scale[expert])
        else:
            codes, multiplier, zero = (part[expert] for part in int4_parts())
            found = family.pack_expert_int4(codes, multiplier, zero, self.scale[expert])
        return found


@cache
def int4_parts() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (EXPERTS, OUTPUTS, INPUTS)).astype(np.uint8)
    chosen = LEGAL_GROUPS[rng.integers(0, len(LEGAL_GROUPS), (EXPERTS, OUTPUTS, INPUTS // 32))].astype(np.uint8)
    return codes, chosen[..., 0], chosen[..., 1]


def layer(kind: str) -> Layer:
    scale = np.random.default_rng(5).uniform(0.001, 0.1, (EXPERTS, OUTPUTS)).astype(np.float32)
    if kind == "int4":
        codes, multiplier, zero = (part.astype(np.int32) for part in int4_parts())
        wide = (np.repeat(part, 32, axis=2) for part in (zero, multiplier))
        return Layer(kind, (codes - next(wide)) * next(wide), scale)
    weight = np.random.default_rng(2).integers(-128, 128, (EXPERTS, OUTPUTS, INPUTS)).astype(np.float32)
    return Layer(kind, weight, scale)


def make_kernel(family: ModuleType, kind: str) -> Any:
    return experts.expert_linear_float if kind == "float" else getattr(family, f"expert_linear_{kind}")


@cache
def linears(family: ModuleType, kind: str) -> dict[Any, Any]:
    """One kernel for each number of tokens whose rows serve a token, and one for rows that serve a pair."""
    make, kernels = make_kernel(family, kind), {}
    for tokens in range(1, TOKENS + 1):
        routing = Routing(tokens, EXPERTS, TOP_K)
        for rows in (tokens, routing.pairs):
            kernels[tokens, rows] = make(routing, rows, OUTPUTS, INPUTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "PARALLEL_FROM_US", 0.0)
        return compile_kernels(kernels)


def apply(family: ModuleType, kind: str, x: Array, chosen: Array, packed: Sequence[Array]) -> Array:
    """Run one layer on rows of tokens or of pairs."""
    order, expert, start, count = (part.astype(np.int32) for part in stated_segments(chosen))
    size = min(chosen.size, EXPERTS) + 1
    segments = [order, np.resize(expert, size), np.resize(start, size), count]
    operands = [x] if kind == "float" else list(quantise.quantise_rows_numpy(x))
    y = np.full((chosen.size, OUTPUTS), np.nan, np.float32)
    return call(linears(family, kind)[len(chosen), len(x)], *operands, *segments, *packed, y)[-1]


LAYERS = [(portable_experts, "float"), *((family.values[0], kind) for family in FAMILIES for kind in ("int8", "int4"))]
needs = [pytest.param(*case, marks=FAMILIES[case[0] is avx512_vnni_experts].marks) for case in LAYERS]
with_layers = pytest.mark.parametrize(("family", "kind"), needs)


def routed(tokens: int) -> Array:
    return chosen_experts(Routing(tokens, EXPERTS, TOP_K), floats(TOKENS, EXPERTS, seed=6)[:tokens])


@with_layers
@pytest.mark.parametrize("per_row", [1, TOP_K])
def test_a_pairs_row_is_the_product_with_its_experts_weight(family: ModuleType, kind: str, per_row: int) -> None:
    experts_layer, chosen = layer(kind), routed(TOKENS)
    x = floats(TOKENS * TOP_K // per_row, INPUTS)
    found = apply(family, kind, x, chosen, experts_layer.packed(family))
    weight = experts_layer.weight.astype(np.float64) * experts_layer.scale[:, :, None]
    expected = np.einsum("pk,pnk->pn", np.repeat(x, per_row, axis=0), weight[chosen.ravel()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@with_layers
@pytest.mark.parametrize("tokens", range(1, TOKENS))
def test_a_tokens_bits_do_not_depend_on_the_others(family: ModuleType, kind: str, tokens: int) -> None:
    packed, x = layer(kind).packed(family), floats(TOKENS, INPUTS)
    together = apply(family, kind, x, routed(TOKENS), packed)
    assert same_bits(apply(family, kind, x[:tokens], routed(tokens), packed), together[: tokens * TOP_K])


@pytest.mark.skipif(not HAS_VNNI, reason="this machine's processor has no avx512_vnni")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_both_families_give_the_same_bits(kind: str) -> None:
    x = floats(TOKENS, INPUTS)
    portable, vnni = (
        apply(family, kind, x, routed(TOKENS), layer(kind).packed(family))
        for family in (portable_experts, avx512_vnni_experts)
    )
    assert same_bits(portable, vnni)


@with_layers
def test_experts_no_token_chose_can_hold_anything(family: ModuleType, kind: str) -> None:
    packed, x, chosen = layer(kind).packed(family), floats(1, INPUTS), routed(1)
    expected = apply(family, kind, x, chosen, packed)
    unread = np.setdiff1d(np.arange(EXPERTS), chosen)
    for array in packed:
        array.reshape(EXPERTS, -1)[unread] = np.nan if array.dtype == np.float32 else 99
    assert same_bits(apply(family, kind, x, chosen, packed), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slab_may_have_more_elements_than_32_bits_count(family: ModuleType, tmp_path: Path) -> None:
    """A sparse file of 2049 experts of 1 MiB, of which the last one is written and read."""
    count, outputs, inputs = 2049, 16, 65536
    kernel = compile_kernels({0: family.expert_linear_int8(Routing(1, count, 1), 1, outputs, inputs)})[0]
    weight = np.random.default_rng(0).integers(0, 256, (outputs, inputs)).astype(np.uint8)
    slices = family.pack_expert_int8(weight, np.ones(outputs, np.float32)).values()
    slabs = []
    for index, last in enumerate(slices):
        shape = (count * len(last), *last.shape[1:])
        slab = np.memmap(tmp_path / str(index), dtype=last.dtype, mode="w+", shape=shape)
        slab[-len(last) :] = last
        slabs.append(slab)
    segments = [[0], [count - 1, count - 1], [0, 1], [1]]
    x = floats(1, inputs)
    small = [*quantise.quantise_rows_numpy(x), *(np.array(part, np.int32) for part in segments)]
    y = tvm.runtime.tensor(np.zeros((1, outputs), np.float32))
    kernel(*(tvm.runtime.tensor(array) for array in small), *(tvm_ffi.from_dlpack(slab) for slab in slabs), y)
    expected = x.astype(np.float64) @ (weight.astype(np.float64) - 128).T
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_mixture_is_the_weighted_sum_of_a_tokens_pairs() -> None:
    routing = Routing(5, EXPERTS, TOP_K)
    kernel = compile_kernels({0: experts.combine(routing, 21)})[0]
    y, weight = floats(routing.pairs, 21), floats(5, TOP_K, seed=1)
    found = call(kernel, y, weight, np.full((5, 21), np.nan, np.float32))[-1]
    expected = np.einsum("tjd,tj->td", y.reshape(5, TOP_K, 21).astype(np.float64), weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
