"""Gated delta rule and causal convolution: both faces, onnxruntime in place, kernels, lowering, and going back."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import onnxscript.optimizer
import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_kernels import call, compile_kernels, floats, same_bits
from tests.test_manifest import sound_manifest
from torch import Tensor, nn
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen
from tvm import relax

from engram_compilers.kernels import loops, recurrent
from engram_compilers.kernels.recurrent import ACTIVATIONS
from engram_compilers.lowering import lower
from engram_compilers.onnx_model import Node, OnnxModel, read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_export.onnx_graph import OPSET
from engram_export.recurrent_operators import causal_conv, gated_delta
from engram_runtime.bundle import Bundle
from engram_runtime.cpu import available_cpus
from engram_runtime.errors import CompileError
from engram_runtime.executor import State, Step, StepInputs, aligned_zeros
from engram_runtime.manifest import DECODER, GraphSpec, Manifest, StateSpec, TensorSpec
from engram_runtime.session import Session

Array = NDArray[Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter, of its own names

# Key heads, value heads, key and value dimensions.
HEADS = {"of whole blocks": (2, 4, 32, 64), "of vectors": (1, 3, 18, 48), "with an edge": (2, 2, 7, 21)}
CONVS = {"plain": (160, 4, 1), "dilated": (40, 4, 3), "of an edge": (9, 2, 3)}  # channels, taps, dilation
USUAL_SIZES = [1, 2, 5, 9, 64]  # tokens of a call
SIZES = [*USUAL_SIZES, *(pytest.param(tokens, marks=pytest.mark.exhaustive) for tokens in (3, 70))]


def unit_rows(*shape: int, seed: int) -> Array:
    x = floats(*shape, seed=seed)
    lengths: Array = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return x / lengths


def delta_inputs(tokens: int, heads: tuple[int, int, int, int]) -> list[Array]:
    """Return query, key, value, log_decay, beta and a state that already holds something."""
    key_heads, value_heads, key_dim, value_dim = heads
    uniform = np.random.default_rng(3).uniform(size=(2, tokens, value_heads)).astype(np.float32)
    return [
        unit_rows(tokens, key_heads, key_dim, seed=1).reshape(tokens, -1),
        unit_rows(tokens, key_heads, key_dim, seed=2).reshape(tokens, -1),
        floats(tokens, value_heads * value_dim, seed=4),
        np.log(uniform[0]),
        uniform[1],
        floats(1, value_heads, key_dim, value_dim, seed=5),
    ]


def delta_statement(inputs: Sequence[Array]) -> tuple[Array, Array]:
    """Return output and next state in float64."""
    query, key, value, log_decay, beta, state = (part.astype(np.float64) for part in inputs)
    tokens, (_, heads, key_dim, _) = len(query), state.shape
    query, key = (x.reshape(tokens, -1, key_dim) for x in (query, key))
    query, key = (x.repeat(heads // x.shape[1], axis=1) for x in (query, key))
    memory, outs = state[0].copy(), []
    for t in range(tokens):
        memory *= np.exp(log_decay[t])[:, None, None]
        delta = beta[t, :, None] * (value[t].reshape(heads, -1) - np.einsum("hkv,hk->hv", memory, key[t]))
        memory += np.einsum("hk,hv->hkv", key[t], delta)
        outs.append(np.einsum("hkv,hk->hv", memory, query[t]).ravel() / np.sqrt(key_dim))
    return np.array(outs), memory[None]


def conv_inputs(tokens: int, conv: tuple[int, int, int]) -> list[Array]:
    """Return x, weight ``[C, 1, taps]`` and a window that already holds something."""
    channels, taps, dilation = conv
    window = floats((taps - 1) * dilation, channels, seed=8)
    return [floats(tokens, channels, seed=6), floats(channels, 1, taps, seed=7), window]


def conv_statement(inputs: Sequence[Array], dilation: int, activation: str) -> tuple[Array, Array]:
    """Return output and next window in float64."""
    x, weight, window = (part.astype(np.float64) for part in inputs)
    steps = np.concatenate([window, x])
    out = np.zeros_like(x)
    for tap in range(weight.shape[2]):
        out += steps[tap * dilation :][: len(x)] * weight[:, 0, tap]
    return out / (1 + np.exp(-out)) if activation == "silu" else out, steps[len(x) :]


# The face that runs


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rule", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_gated_delta_is_the_rule_of_transformers(name: str, rule: str) -> None:
    key_heads, heads, _, _ = HEADS[name]
    query, key, value, log_decay, beta, state = (torch.from_numpy(part) for part in delta_inputs(70, HEADS[name]))
    expected, expected_state = getattr(qwen, rule)(
        query.view(1, 70, key_heads, -1),
        key.view(1, 70, key_heads, -1),
        value.view(1, 70, heads, -1),
        log_decay[None],
        beta[None],
        initial_state=state,
        output_final_state=True,
    )
    out, following = gated_delta(query, key, value, log_decay, beta, state, num_heads=heads)
    torch.testing.assert_close(out, expected[0].flatten(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(following, expected_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_causal_conv_is_the_convolution_of_transformers(tokens: int) -> None:
    x, weight, window = (torch.from_numpy(part) for part in conv_inputs(tokens, CONVS["plain"]))
    expected_window = window.T[None].clone()
    expected = qwen.causal_conv1d_update(x.T[None], expected_window, weight.squeeze(1), None, "silu")
    out, following = causal_conv(x, weight, window, dilation=1, activation="silu")
    torch.testing.assert_close(out, expected[0].T, rtol=0, atol=1e-6)
    assert torch.equal(following, expected_window[0].T)


# The face that is exported

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = LAYER = (2, 4, 16, 24)
KEYS, VALUES = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
DILATION = 3
STATES = (
    StateSpec(name="window.0", dtype="float32", shape=(9, 2 * KEYS + VALUES), kind="window"),
    StateSpec(name="state.0", dtype="float32", shape=(1, VALUE_HEADS, KEY_DIM, VALUE_DIM), kind="recurrent"),
)
INPUTS = {"x": 2 * KEYS + VALUES, "log_decay": VALUE_HEADS, "beta": VALUE_HEADS}


class Layer(nn.Module):
    """Both operators, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.from_numpy(floats(2 * KEYS + VALUES, 1, 4, seed=9)) / 4  # keys stay shorter than one
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(
        self, x: Tensor, log_decay: Tensor, beta: Tensor, window: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, window = causal_conv(x, self.weight, window, dilation=DILATION, activation="silu")
        query, key, value = torch.split(mixed, [KEYS, KEYS, VALUES], dim=1)
        out, state = gated_delta(query, key, value, log_decay, beta, state, num_heads=VALUE_HEADS)
        return out, window, state


@cache
def exported_layer() -> bytes:
    """Return the layer's ONNX model, weights included."""
    tokens = torch.export.Dim("T")
    arguments = tuple(torch.zeros(5, width) for width in INPUTS.values())
    states = tuple(torch.zeros(state.shape) for state in STATES)
    dynamic: Any = (*({0: tokens} for _ in arguments), *({} for _ in states))
    program = torch.export.export(Layer(), (*arguments, *states), dynamic_shapes=dynamic, strict=False)
    names = [state.name for state in STATES]
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        input_names=[*INPUTS, *names],
        output_names=["logits", *(f"next.{name}" for name in names)],
    )
    assert exported is not None
    onnxscript.optimizer.optimize(exported.model)
    proto: onnx.ModelProto = exported.model_proto
    return bytes(proto.SerializeToString())


def layer_inputs(tokens: int) -> list[Array]:
    *_, log_decay, beta, state = delta_inputs(tokens, LAYER)
    return [floats(tokens, INPUTS["x"]) / 2, log_decay, beta, floats(*STATES[0].shape, seed=8) / 2, state]


def eager_layer(inputs: Sequence[Array]) -> list[Array]:
    return [out.numpy() for out in Layer()(*(torch.from_numpy(part) for part in inputs))]


def test_each_operator_is_exported_as_one_node() -> None:
    nodes = [node for node in onnx.load_from_string(exported_layer()).graph.node if node.domain == "com.microsoft"]
    assert [node.op_type for node in nodes] == ["CausalConvWithState", "LinearAttention"]


@pytest.mark.parametrize("tokens", [1, 2, 5, 9, 64])
def test_onnxruntime_runs_the_nodes_in_place(tokens: int) -> None:
    """The window passes through Unsqueeze and Squeeze on its way; input and output are the same memory all the same."""
    session = ort.InferenceSession(exported_layer(), providers=["CPUExecutionProvider"])
    inputs = layer_inputs(tokens)
    expected = eager_layer(inputs)
    binding = session.io_binding()
    for name, part in zip(INPUTS, inputs, strict=False):
        binding.bind_cpu_input(name, part)
    states = [np.copy(part) for part in inputs[3:]]
    values = [ort.OrtValue.ortvalue_from_numpy(state) for state in states]
    for spec, value in zip(STATES, values, strict=True):
        binding.bind_ortvalue_input(spec.name, value)
        binding.bind_ortvalue_output(f"next.{spec.name}", value)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    found = [binding.get_outputs()[-1].numpy(), *states]
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=0, atol=1e-5)


# Kernels


@cache
def delta_kernel(name: str, tokens: int) -> Callable[..., None]:
    kernel = recurrent.gated_delta(tokens, *HEADS[name], HEADS[name][2] ** -0.5)
    return compile_kernels({0: kernel})[0]


@cache
def conv_kernel(name: str, activation: str, tokens: int) -> Callable[..., None]:
    return compile_kernels({0: recurrent.causal_conv(tokens, *CONVS[name], ACTIVATIONS[activation])})[0]


def run_delta(kernel: Callable[..., None], inputs: Sequence[Array]) -> list[Array]:
    """Return output and next state; the output starts as NaN, so all of it must be written."""
    return call(kernel, *inputs, np.full_like(inputs[2], np.nan))[:-3:-1]


def run_conv(kernel: Callable[..., None], inputs: Sequence[Array]) -> list[Array]:
    x, weight, window = inputs
    return call(kernel, x, weight[:, 0].T, window, np.full_like(x, np.nan))[:-3:-1]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tokens", SIZES)
def test_the_gated_delta_kernel_is_its_numpy_statement(tokens: int, name: str) -> None:
    inputs = delta_inputs(tokens, HEADS[name])
    for found, expected in zip(run_delta(delta_kernel(name, tokens), inputs), delta_statement(inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", SIZES)
def test_the_convolution_kernel_is_its_numpy_statement(tokens: int, activation: str, name: str) -> None:
    inputs = conv_inputs(tokens, CONVS[name])
    expected, expected_window = conv_statement(inputs, CONVS[name][2], activation)
    found, window = run_conv(conv_kernel(name, activation, tokens), inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert same_bits(window, expected_window.astype(np.float32))


def test_a_head_that_forgets_everything_keeps_only_the_last_token() -> None:
    inputs = delta_inputs(9, HEADS["of vectors"])
    inputs[3], inputs[4] = np.full_like(inputs[3], -200), np.ones_like(inputs[4])
    _, state = run_delta(delta_kernel("of vectors", 9), inputs)
    key, value = inputs[1][-1], inputs[2][-1].reshape(3, 1, 48)
    assert same_bits(state, (key[:, None] * value)[None])


def in_pieces(
    run: Callable[[Callable[..., None], Sequence[Array]], list[Array]],
    kernel: Callable[[int], Callable[..., None]],
    inputs: Sequence[Array],
    sizes: Sequence[int],
    cut: Sequence[bool],
) -> list[Array]:
    """Run the tokens of ``inputs``, the last of which is the state, in pieces; ``cut`` tells which others to cut."""
    state, outs, start = inputs[-1], [], 0
    for size in sizes:
        piece = [x[start : start + size] if has_tokens else x for x, has_tokens in zip(inputs[:-1], cut, strict=True)]
        out, state = run(kernel(size), [*piece, state])
        outs.append(out)
        start += size
    return [np.concatenate(outs), state]


PIECES = st.lists(st.sampled_from(USUAL_SIZES), min_size=1, max_size=6)


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=15, deadline=None)
@given(sizes=PIECES)
def test_gated_delta_in_pieces_is_token_by_token(name: str, sizes: list[int]) -> None:
    inputs, tokens = delta_inputs(sum(sizes), HEADS[name]), [True] * 5
    kernel = partial(delta_kernel, name)
    found = in_pieces(run_delta, kernel, inputs, sizes, tokens)
    expected = in_pieces(run_delta, kernel, inputs, [1] * sum(sizes), tokens)
    assert [same_bits(f, e) for f, e in zip(found, expected, strict=True)] == [True] * 2


@pytest.mark.parametrize("name", CONVS)
@settings(max_examples=15, deadline=None)
@given(sizes=PIECES)
def test_a_convolution_in_pieces_is_token_by_token(name: str, sizes: list[int]) -> None:
    inputs, tokens = conv_inputs(sum(sizes), CONVS[name]), [True, False]
    kernel = partial(conv_kernel, name, "silu")
    found = in_pieces(run_conv, kernel, inputs, sizes, tokens)
    expected = in_pieces(run_conv, kernel, inputs, [1] * sum(sizes), tokens)
    assert [same_bits(f, e) for f, e in zip(found, expected, strict=True)] == [True] * 2


SHARE_ALL_CORES = -3  # ThreadGroup::kSpecifyThreadShareAllCore: TVM pins no thread, the calling one least of all


def with_threads(count: int) -> None:
    cpus = [str(cpu) for cpu in available_cpus()]
    tvm.get_global_func("runtime.config_threadpool")(SHARE_ALL_CORES, count, cpus)


@pytest.mark.parametrize("tokens", [1, 9])
def test_threads_do_not_change_a_bit(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "PARALLEL_FROM_US", 0.0)
    heads, conv = HEADS["of whole blocks"], (600, 4, 3)
    delta, convolution = compile_kernels(
        {
            "delta": recurrent.gated_delta(tokens, *heads, 0.25),
            "conv": recurrent.causal_conv(tokens, *conv, ACTIVATIONS["silu"]),
        }
    ).values()
    results = []
    for threads in (1, 2):
        with_threads(threads)
        results.append(run_delta(delta, delta_inputs(tokens, heads)) + run_conv(convolution, conv_inputs(tokens, conv)))
    assert [same_bits(one, two) for one, two in zip(*results, strict=True)] == [True] * 4


# Lowering


def graph_spec(states: Sequence[StateSpec]) -> GraphSpec:
    """Return the interface of a layer by itself; every pass has a position."""
    inputs = [TensorSpec(name=name, dtype="float32", shape=("T", width)) for name, width in INPUTS.items()]
    position = TensorSpec(name="position", dtype="int64", shape=(1,))
    return GraphSpec(file="", weights="", inputs=(*inputs, position), outputs=(), states=tuple(states))


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_lowered_layer_computes_what_torch_does_and_changes_its_states_in_place(tokens: int, tmp_path: Path) -> None:
    graph, weights = tmp_path / "graph.onnx", tmp_path / "weights"
    onnx.save_model(onnx.load_from_string(exported_layer()), graph, save_as_external_data=True, location=weights.name)
    model = read_onnx_model(graph, weights)
    with PackedWeights(tmp_path / "packed") as packed:
        module = lower({DECODER: (model, graph_spec(STATES))}, packed, family="portable", passes=[(tokens, 1)]).module
    taps = np.fromfile(tmp_path / "packed", np.float32).reshape(next(iter(packed.tensors.values())).shape)
    machine = relax.VirtualMachine(relax.build(module, tvm.target.Target("llvm")), tvm.cpu())
    inputs = layer_inputs(tokens)
    states = [aligned_zeros(spec.shape) for spec in STATES]
    for state, part in zip(states, inputs[3:], strict=True):
        state[...] = part
    held = [tvm.runtime.from_dlpack(state) for state in states]
    arguments = [tvm.runtime.tensor(part) for part in (*inputs[:3], np.zeros(1, np.int64))]
    out = machine[f"forward_{tokens}_1"](*arguments, *held, tvm.runtime.tensor(taps))[0]
    for found, expected in zip([out.numpy(), *states], eager_layer(inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def refusal(tmp_path: Path, nodes: Sequence[Node], states: Sequence[StateSpec] = ()) -> str:
    """Return why a graph isn't lowered; its inputs come with a leading axis of one as ``<name>1``."""
    batched = [Node("Unsqueeze", (name, "axes"), (f"{name}1",), {}) for name in (*INPUTS, *(s.name for s in states))]
    model = OnnxModel((*batched, *nodes), {"axes": np.array([0])}, {}, np.zeros(0, np.uint8))
    with PackedWeights(tmp_path / "packed") as packed, pytest.raises(CompileError) as caught:
        lower({DECODER: (model, graph_spec(states))}, packed, family="portable", passes=[(2, 1)])
    return str(caught.value)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (b"gated", "has update_rule b'gated', kernels need one of (b'gated_delta',)"),
        (
            b"gated_delta",
            "has 2 heads and inputs [(2, 160), (2, 160), (2, 160), (2, 4), (2, 4)] for a state (1, 4, 16, 24); kernels "
            "need value heads in equal groups over key heads, and a decay and a beta per value head",
        ),
    ],
    ids=["rule", "sizes"],
)
def test_linear_attention_of_another_rule_or_shape_is_refused(tmp_path: Path, rule: bytes, expected: str) -> None:
    attributes = {"q_num_heads": 2, "kv_num_heads": 4, "update_rule": rule, "scale": 0.25}
    state = StateSpec(name="state", dtype="float32", shape=(1, 4, 16, 24), kind="recurrent")
    inputs = ("x1", "x1", "x1", "state", "log_decay1", "beta1")
    node = Node("com.microsoft.LinearAttention", inputs, ("logits", "next.state"), attributes)
    assert refusal(tmp_path, [node], [state]) == f"com.microsoft.LinearAttention {expected}"


def test_a_convolution_by_an_activation_is_refused(tmp_path: Path) -> None:
    attributes = {"activation": b"silu", "channels_last": 1, "dilation": 3}
    node = Node(
        "com.microsoft.CausalConvWithState", ("x1", "x", "", "window.01"), ("logits", "next.window.0"), attributes
    )
    assert refusal(tmp_path, [node], STATES[:1]) == (
        "com.microsoft.CausalConvWithState by x is not supported; kernels need a stored weight"
    )


def test_an_operator_without_its_leading_axis_is_refused(tmp_path: Path) -> None:
    attributes = {"activation": b"silu", "channels_last": 1, "dilation": 3}
    inputs = ("x", "x", "", "window.0")
    node = Node("com.microsoft.CausalConvWithState", inputs, ("logits", "next.window.0"), attributes)
    assert refusal(tmp_path, [node], STATES[:1]) == (
        "input x of com.microsoft.CausalConvWithState has no leading axis of one; unsqueeze it"
    )


# Going back


class RunningSum:
    """An executor whose one state is the sum of all token ids so far; the logits are that sum."""

    name, threads, expert_bytes_read, float16_states = "running sum", 1, None, ()
    experts_read = None

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [count]

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        def step(inputs: StepInputs) -> NDArray[np.float32]:
            states["state.0"][...] += inputs.token_ids.sum()
            return np.full((len(inputs.logit_rows), 1), states["state.0"].flat[0])

        return FunctionStep(step)


def test_trimming_computes_a_recurrent_state_again() -> None:
    raw = sound_manifest()
    raw["graphs"]["decoder"]["states"] += [
        {"name": "state.0", "dtype": "float32", "shape": [1, 2, 4, 4], "kind": "recurrent"}
    ]
    with Session(Bundle(Path(), Manifest.from_dict(raw)), RunningSum(), []) as session:
        session.prefill([1, 2, 3])
        session.trim(2)
        assert session.prefill([10]) == [11]
        session.trim(2)
        assert session.prefill([4]) == [4]
