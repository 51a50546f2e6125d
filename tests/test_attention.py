"""Attention operators: what they compute, and that torch, onnxruntime and compiled kernels agree on it."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests import attention_layers as rig
from tests.attention_layers import LAYERS, SCALE, WINDOW, Array, Run
from tests.test_kernels import call, compile_kernels, floats, same_bits
from torch import Tensor
from transformers import DynamicCache, Qwen4ExpTextConfig
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen

from engram_compilers.kernels import attention, block_selection, loops
from engram_compilers.onnx_model import Node
from engram_compilers.signatures import SIGNATURES
from engram_export import attention_operators
from engram_export.onnx_functions import add_functions
from engram_runtime.errors import CompileError

TOKENS = rig.CAPACITY  # the last step fills the caches
MIXED = (64, 64, 7, 7, *(1,) * 7)
STEPS = [(1,) * TOKENS, (7,) * 21 + (1,) * 2, (64, 64, *(1,) * 21), MIXED]
# Scores and values are of order 1; what differs is the order of a few hundred additions.
TOLERANCE = 5e-6


@cache
def x_of(name: str) -> Array:
    found: Array = floats(TOKENS, LAYERS[name][1], seed=len(name))
    return found


@cache
def eager(name: str) -> Run:
    """Run all tokens at once in torch."""
    layer, _ = LAYERS[name]
    states = rig.new_states(layer)
    return rig.run_steps(rig.torch_step(layer, states), states, x_of(name), [TOKENS])


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Traced graphs, each made once."""
    folder = tmp_path_factory.mktemp("graphs")

    def traced(name: str) -> Path:
        path = folder / f"{name}.onnx"
        return path if path.exists() else rig.trace(*LAYERS[name], path)

    return traced


@pytest.fixture(scope="module")
def machine(graph: Callable[[str], Path]) -> Callable[..., Any]:
    """Compiled graphs, each made once: all kernels parallel, or none."""

    @cache
    def compiled(name: str, parallel_from_us: float = 0.0) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loops, "PARALLEL_FROM_US", parallel_from_us)
            return rig.compile_graph(graph(name), *LAYERS[name])

    return compiled


def assert_close(found: Run, expected: Run) -> None:
    np.testing.assert_allclose(found.out, expected.out, rtol=0, atol=TOLERANCE)
    for state, wanted in zip(found.states, expected.states, strict=True):
        np.testing.assert_allclose(state, wanted, rtol=0, atol=TOLERANCE)


def assert_same_bits(found: Run, expected: Run) -> None:
    assert same_bits(found.out, expected.out)
    assert [same_bits(a, b) for a, b in zip(found.states, expected.states, strict=True)] == [True] * len(found.states)


# What the operators compute


def rotated(x: NDArray[np.float64], rotary_dim: int) -> NDArray[np.float64]:
    """Turn the first dimensions of ``x [T, H, hd]`` as complex numbers."""
    frequency = 10000.0 ** (-np.arange(rotary_dim // 2) / (rotary_dim // 2))
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
    real, imaginary, rest = np.split(x, [rotary_dim // 2, rotary_dim], axis=2)
    turned = (real + 1j * imaginary) * turn
    return np.concatenate([turned.real, turned.imag, rest], axis=2)


def stated(q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Attend in float64, one token and head after the other."""
    out = np.zeros_like(q)
    for token, head in np.ndindex(q.shape[:2]):
        seen, kv_head = slice(max(token + 1 - window, 0), token + 1), head // (q.shape[1] // k.shape[1])
        scores = k[seen, kv_head] @ q[token, head] * SCALE
        weights = np.exp(scores)
        out[token, head] = weights / weights.sum() @ v[seen, kv_head]
    return out.reshape(len(q), -1)


@pytest.mark.parametrize(
    ("name", "rotary_dim", "window"),
    [
        ("windowed", rig.HEAD_DIM // 2, WINDOW),
        ("plain", rig.HEAD_DIM, TOKENS),
        ("shared", rig.HEAD_DIM // 2, WINDOW),
    ],
)
def test_cached_attention_is_softmax_over_the_tokens_in_the_window(name: str, rotary_dim: int, window: int) -> None:
    heads = x_of(name).astype(np.float64).reshape(TOKENS, -1, rig.HEAD_DIM)
    q, k, v, other_q = np.split(heads, np.cumsum([rig.HEADS, rig.KV_HEADS, rig.KV_HEADS]), axis=1)
    asked = other_q if name == "shared" else q
    expected = stated(rotated(asked, rotary_dim), rotated(k, rotary_dim), v, window)
    np.testing.assert_allclose(eager(name).out, expected, rtol=0, atol=TOLERANCE)


class TinyQwen:
    """An attention layer of transformers' qwen4_exp, and the same through `indexed_attention`."""

    def __init__(self, *, budget: int) -> None:
        self.config = Qwen4ExpTextConfig(
            hidden_size=48,
            num_hidden_layers=1,
            layer_types=["indexed_attention"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=TOKENS,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [4, 2, 2],
            },
            indexer_n_heads=8,  # so many that no two scores are 0: which of equals transformers takes is not stated
            indexer_kv_heads=1,
            indexer_head_dim=24,
            indexer_budget=budget,
            indexer_compress_ratio=4,
        )
        self.config._attn_implementation = "sdpa"
        self.layer = qwen.Qwen4ExpTextAttention(self.config, 0)
        rng = torch.Generator().manual_seed(7)
        for parameter in self.layer.parameters():
            values = torch.randn(parameter.shape, generator=rng)
            parameter.data = values / 5 if parameter.ndim == 1 else values / parameter.shape[-1] ** 0.5
        positions = torch.arange(TOKENS)[None]
        self.turn = qwen.Qwen4ExpTextRotaryEmbedding(self.config)(torch.zeros(1), positions[None])

    def transformers(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Run ``x [T, D]`` through the layer of transformers."""
        cache, outs, position = DynamicCache(config=self.config), [], 0
        for part in torch.split(x, list(sizes)):
            end = position + len(part)
            mask = torch.arange(end) <= torch.arange(position, end)[:, None]
            turn = tuple(table[:, :end] for table in self.turn)
            outs.append(self.layer(part[None], turn, mask[None, None], cache)[0][0])
            position = end
        return torch.cat(outs)

    def ours(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Run ``x [T, D]`` through `indexed_attention`; projections, norms and the output gate are the caller's."""
        states = [torch.zeros(1, heads, TOKENS, dim) for heads, dim in ((2, 32), (2, 32), (1, 24))]
        outs, position = [], 0
        for part in torch.split(x, list(sizes)):
            out, *states = self._attend(part, states, position)
            outs.append(out)
            position += len(part)
        return torch.cat(outs)

    def _attend(self, x: Tensor, states: list[Tensor], position: int) -> tuple[Tensor, ...]:
        layer, indexer = self.layer, self.layer.indexer
        query, gate = layer.q_proj(x).view(len(x), 4, 64).chunk(2, dim=-1)
        key, value = layer.k_norm(layer.k_proj(x).view(len(x), 2, 32)), layer.v_proj(x)
        cos, sin = (table[0, :, :8] for table in self.turn)
        qkv = torch.cat([layer.q_norm(query).flatten(1), key.flatten(1), value], dim=1)
        out, *after = attention_operators.indexed_attention(
            qkv,
            indexer.index_qk_proj(x),
            1 + indexer.q_layernorm.weight,
            1 + indexer.k_layernorm.weight,
            states[0],
            states[1],
            states[2],
            torch.tensor([position]),
            cos,
            sin,
            num_heads=4,
            scale=layer.scaling,
            budget=self.config.indexer_budget,
            block=self.config.indexer_compress_ratio,
            eps=self.config.rms_norm_eps,
        )
        return layer.o_proj(out * torch.sigmoid(gate.flatten(1))), *after


@pytest.mark.parametrize("sizes", [(1,), (7,), (64,), (TOKENS,), (7, *(1,) * 40), MIXED], ids=str)
@pytest.mark.parametrize("budget", [8, 64])
@torch.no_grad()
def test_indexed_attention_is_that_of_transformers(budget: int, sizes: tuple[int, ...]) -> None:
    tiny, x = TinyQwen(budget=budget), torch.from_numpy(floats(sum(sizes), 48, seed=3))
    torch.testing.assert_close(tiny.ours(x, sizes), tiny.transformers(x, sizes), rtol=0, atol=TOLERANCE)


# Three ways to run them


@pytest.mark.parametrize("sizes", STEPS, ids=["1", "7", "64, then 1", "mixed"])
@pytest.mark.parametrize("name", LAYERS)
def test_torch_in_steps_is_torch_at_once(name: str, sizes: tuple[int, ...]) -> None:
    layer, _ = LAYERS[name]
    states = rig.new_states(layer)
    assert_close(rig.run_steps(rig.torch_step(layer, states), states, x_of(name), sizes), eager(name))


@pytest.mark.parametrize(
    "sizes", [*STEPS, (TOKENS,), (*(2,) * 74, 1)], ids=["1", "7", "64, then 1", "mixed", "all", "2"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_onnxruntime_in_place_is_torch(graph: Callable[[str], Path], name: str, sizes: tuple[int, ...]) -> None:
    states = rig.new_states(LAYERS[name][0])
    assert_close(rig.run_steps(rig.ort_step(graph(name), states), states, x_of(name), sizes), eager(name))


@pytest.mark.parametrize("name", LAYERS)
def test_rows_from_the_position_on_are_left_alone(graph: Callable[[str], Path], name: str) -> None:
    states = rig.new_states(LAYERS[name][0])
    rig.run_steps(rig.ort_step(graph(name), states), states, x_of(name), [64, 7])
    assert [np.isnan(state[:, :, 71:]).all() for state in states] == [True] * len(states)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_attention_is_torch(machine: Callable[..., Any], name: str) -> None:
    assert_close(rig.tvm_run(machine(name), LAYERS[name][0], x_of(name), MIXED), eager(name))


@pytest.mark.parametrize("sizes", STEPS[:3], ids=["1", "7", "64, then 1"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_attention_has_the_same_bits_in_any_steps(
    machine: Callable[..., Any], name: str, sizes: tuple[int, ...]
) -> None:
    found, expected = (rig.tvm_run(machine(name), LAYERS[name][0], x_of(name), steps) for steps in (sizes, MIXED))
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    "name", ["windowed", "indexed", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("plain", "shared"))]
)
def test_threads_do_not_change_a_bit(machine: Callable[..., Any], name: str) -> None:
    parallel, serial = (
        rig.tvm_run(machine(name, limit_us), LAYERS[name][0], x_of(name), MIXED) for limit_us in (0.0, np.inf)
    )
    assert_same_bits(parallel, serial)


@pytest.mark.parametrize("name", LAYERS)
def test_sequences_of_any_lengths_have_the_bits_of_passes_of_their_own(machine: Callable[..., Any], name: str) -> None:
    layer, x = LAYERS[name][0], x_of(name)
    lengths = (0, 63, TOKENS - 1)
    alone = []
    arguments = [tvm.runtime.tensor(x[list(lengths)]), tvm.runtime.tensor(np.array(lengths))]
    held = []
    for length in lengths:
        states = rig.new_states(layer)
        step = rig.tvm_step(machine(name), states)
        for position in range(length):
            step(x[position : position + 1], position)
        held.append([tvm.runtime.tensor(state) for state in states])
        alone.append((step(x[length : length + 1], length), states))
    found = machine(name)[f"batch_{len(lengths)}"](*arguments, *itertools.chain.from_iterable(held))[0].numpy()
    for index, (expected, states) in enumerate(alone):
        assert same_bits(found[index : index + 1], expected)
        for state, changed in zip(states, held[index], strict=True):
            np.testing.assert_array_equal(changed.numpy().view(np.uint32), state.view(np.uint32))


@pytest.mark.parametrize("first", [0, 30, 62, TOKENS - rig.SEQUENCES])  # within blocks of keys, over their ends
@pytest.mark.parametrize("name", LAYERS)
def test_tokens_of_one_sequence_have_the_bits_of_passes_of_their_own(
    machine: Callable[..., Any], name: str, first: int
) -> None:
    """The rows' caches are one and the same memory, where a pass before has left other tokens at these positions."""
    layer, x, end = LAYERS[name][0], x_of(name), first + rig.SEQUENCES
    states = rig.new_states(layer)
    step = rig.tvm_step(machine(name), states)
    for position in range(first):
        step(x[position : position + 1], position)
    held = [tvm.runtime.tensor(state) for state in states]
    expected = np.concatenate([step(x[position : position + 1], position) for position in range(first, end)])
    for rows in (-x[first:end], x[first:end]):
        arguments = [tvm.runtime.tensor(rows), tvm.runtime.tensor(np.arange(first, end))]
        found = machine(name)[f"batch_{rig.SEQUENCES}"](*arguments, *held * rig.SEQUENCES)[0].numpy()
    assert same_bits(found, expected)
    for state, changed in zip(states, held, strict=True):
        np.testing.assert_array_equal(changed.numpy().view(np.uint32), state.view(np.uint32))


@pytest.mark.parametrize("end", [8, 30, 67, 68])  # after, in and at the ends of blocks
def test_tokens_are_forgotten_by_moving_the_end(machine: Callable[..., Any], end: int) -> None:
    """The index cache holds keys of blocks that become incomplete again: they must not count."""
    layer, x = LAYERS["indexed"][0], x_of("indexed")
    other = np.concatenate([x[:end], -x[end:]])
    states = rig.new_states(layer)
    step = rig.tvm_step(machine("indexed"), states)
    rig.run_steps(step, states, x, [64, 64])
    found = np.concatenate([step(other[position : position + 7], position) for position in range(end, end + 28, 7)])
    expected = rig.tvm_run(machine("indexed"), layer, other[: end + 28], (1,) * (end + 28))
    assert same_bits(found, expected.out[end:])


# Kernels


def live_bits(live: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """Spread words of 16 keys to ``[T, count]``."""
    spread = (live[:, :, None] >> np.arange(16)) & 1
    return spread.reshape(len(live), -1)[:, :count].astype(bool)


CHOSEN = 3


@cache
def select_kernels() -> dict[Any, Callable[..., None]]:
    return compile_kernels({block: block_selection.select_blocks(1, 160, block, CHOSEN) for block in (1, 4, 16, 24)})


@settings(deadline=None, max_examples=60)
@given(block=st.sampled_from([1, 4, 16, 24]), seen=st.integers(1, 160), data=st.data())
def test_the_blocks_of_highest_score_are_selected_the_lower_one_of_equals(
    block: int, seen: int, data: st.DataObject
) -> None:
    complete = seen // block
    few = st.sampled_from([0.0, 1e-40, 0.5, 0.5000001, 3e38])  # so few that most are tied
    scores = np.array(data.draw(st.lists(few, min_size=complete, max_size=complete)), np.float32)
    ranks = np.full((1, block_selection.ranks_width(160, block)), -1, np.int32)
    ranks[0, :complete] = scores.view(np.int32)
    live = call(select_kernels()[block], ranks, np.array([seen - 1]), np.full((1, 12), -1, np.int32))[-1]
    best = sorted(range(complete), key=lambda index: (-scores[index], index))[:CHOSEN]
    expected = [key // block in best or key // block >= complete for key in range(seen)]
    assert live_bits(live, seen)[0].tolist() == expected
    assert not live_bits(live, loops.round_up(seen, 64))[0, seen:].any()


@cache
def wide_kernels() -> dict[Any, Callable[..., None]]:
    sizes = {64: (8, 2, 64), 256: (4, 2, 256), 512: (2, 1, 512)}  # heads, kv heads, dimensions
    kernels: dict[Any, Any] = {}
    for head_dim, (heads, kv_heads, _) in sizes.items():
        shape = (3, heads, kv_heads, head_dim, rig.CAPACITY, SCALE / head_dim**0.5)
        kernels["attend", head_dim] = attention.attend(*shape)
        kernels["selected", head_dim] = attention.attend_selected(*shape)
    return compile_kernels(kernels)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 2, 256), (2, 1, 512)])
def test_attention_to_selected_keys_is_attention_to_the_others_left_out(
    heads: int, kv_heads: int, head_dim: int
) -> None:
    q, keys, values = (
        floats(3, heads * head_dim),
        *(floats(1, kv_heads, rig.CAPACITY, head_dim, seed=seed) for seed in (1, 2)),
    )
    live = np.random.default_rng(3).integers(0, 2**16, size=(3, 12)).astype(np.int32)
    live[:, 3:8] = 0  # a whole block of 64 keys, and more, without a live one
    live[:, 8] = 0xFFFF  # the last of 131, 132 and 133 keys
    found = call(wide_kernels()["selected", head_dim], q, keys, values, np.array([130]), live, np.zeros_like(q))[-1]
    expected = np.zeros((3, heads, head_dim))
    for token, head in np.ndindex(3, heads):
        seen = np.flatnonzero(live_bits(live, 131 + token)[token])
        kv_head = head // (heads // kv_heads)
        query = q[token, head * head_dim : (head + 1) * head_dim].astype(np.float64)
        weights = np.exp(keys[0, kv_head, seen] @ query * SCALE / head_dim**0.5)
        expected[token, head] = weights / weights.sum() @ values[0, kv_head, seen]
    np.testing.assert_allclose(found, expected.reshape(3, -1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("position", [0, 30, 63, 64, 130])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 2, 256), (2, 1, 512)])
def test_attention_to_all_keys_selected_has_the_bits_of_plain_attention(
    heads: int, kv_heads: int, head_dim: int, position: int
) -> None:
    q, *caches = (
        floats(3, heads * head_dim),
        *(floats(1, kv_heads, rig.CAPACITY, head_dim, seed=seed) for seed in (1, 2)),
    )
    for cache_ in caches:
        cache_[:, :, position + 3 :] = np.nan
    live, at = np.full((3, 12), 0xFFFF, np.int32), np.array([position])
    selected = call(wide_kernels()["selected", head_dim], q, *caches, at, live, np.zeros_like(q))[-1]
    plain = call(wide_kernels()["attend", head_dim], q, *caches, at, np.zeros_like(q))[-1]
    assert same_bits(selected, plain)


def test_wide_heads_of_one_token_have_the_bits_of_nine() -> None:
    """Of nine tokens four heads share a load, of one only two: each sum has the same order."""
    kernels = compile_kernels({tokens: attention.attend(tokens, 8, 1, 256, 160, SCALE / 16) for tokens in (1, 9)})
    q, keys, values = floats(9, 8 * 256), floats(1, 1, 160, 256, seed=1), floats(1, 1, 160, 256, seed=2)
    together = call(kernels[9], q, keys, values, np.array([100]), np.zeros_like(q))[-1]
    alone = [
        call(kernels[1], q[t : t + 1], keys, values, np.array([100 + t]), np.zeros_like(q[:1]))[-1] for t in range(9)
    ]
    assert same_bits(together, np.concatenate(alone))


# Graphs and errors


def test_a_traced_graph_holds_one_node_and_the_function_it_stands_for(graph: Callable[[str], Path]) -> None:
    model = onnx.load(graph("indexed"))
    assert [node.op_type for node in model.graph.node if node.domain] == ["IndexedAttention"]
    assert [(function.domain, function.name) for function in model.functions] == [("engram", "IndexedAttention")]
    onnx.checker.check_model(model, full_check=False)


def test_a_graph_without_our_nodes_gets_no_functions(graph: Callable[[str], Path]) -> None:
    model = ir.load(graph("windowed"))
    add_functions(model)
    assert not model.functions
    assert "engram" not in model.opset_imports


@pytest.mark.parametrize(
    ("operator", "known"),
    [
        (
            "com.microsoft.GroupQueryAttention",
            ["do_rotary", "kv_num_heads", "local_window_size", "num_heads", "scale"],
        ),
        (
            "engram.SharedAttention",
            ["kv_num_heads", "local_window_size", "num_heads", "scale"],
        ),
        (
            "engram.IndexedAttention",
            ["block", "budget", "epsilon", "index_heads", "kv_num_heads", "num_heads", "rotary_dim", "scale"],
        ),
    ],
)
def test_attributes_without_lowering_are_named(operator: str, known: list[str]) -> None:
    inputs = tuple("x" if place in SIGNATURES[operator].needs else "" for place in range(10))
    node = Node(operator, inputs, (), {"num_heads": 4, "smooth_softmax": 1, "causal": 0})
    with pytest.raises(CompileError) as caught:
        SIGNATURES[operator].check(node)
    assert str(caught.value) == (
        f"{operator} has attributes ['causal', 'smooth_softmax'] without lowering; there are {known}"
    )


@pytest.mark.parametrize("window", [0, -2])
def test_a_window_without_a_token_is_refused(window: int) -> None:
    with pytest.raises(CompileError) as caught:
        attention.attend(1, 4, 2, 32, 64, SCALE, window)
    assert str(caught.value) == (
        f"attention has a window of {window} tokens, kernels need at least 1; export the model again"
    )


def test_heads_that_are_no_whole_vectors_are_refused(tmp_path: Path) -> None:
    narrow = rig.Layer(LAYERS["plain"][0].attend, 24, [(1, 2, rig.CAPACITY, 24)] * 2)
    path = rig.trace(narrow, 8 * 24, tmp_path / "narrow.onnx")
    with pytest.raises(CompileError) as caught:
        rig.compile_graph(path, narrow, 8 * 24)
    assert str(caught.value) == (
        "attention has 4 heads of 24 dimensions over 2, kernels need a multiple of 16 dimensions and of 2 heads, "
        "and so does onnxruntime; export a model that has them"
    )
