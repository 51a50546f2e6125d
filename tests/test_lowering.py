"""Graphs that can't be lowered are refused with the operator and what is missing or unknown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from engram_compilers.lowering import CONVERTERS, lower
from engram_compilers.onnx_model import Node, OnnxModel
from engram_compilers.packed_weights import PackedWeights
from engram_compilers.signatures import SIGNATURES
from engram_runtime.errors import CompileError
from engram_runtime.manifest import DECODER, GraphSpec, StateSpec, TensorSpec

KEYS = StateSpec(name="key.0", dtype="float32", shape=(1, 2, 32, 16), kind="positional")
VALUES = StateSpec(name="value.0", dtype="float32", shape=(1, 2, 32, 16), kind="positional")
WINDOW = StateSpec(name="window.0", dtype="float32", shape=(3, 64), kind="window")
SPEC = GraphSpec(
    file="",
    weights="",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("T", 128)),
        TensorSpec(name="position", dtype="int64", shape=(1,)),
        TensorSpec(name="turn", dtype="float32", shape=(32, 8)),
    ),
    outputs=(),
    states=(),
)
CONSTANTS = {"zero": np.array([0]), "cube": np.array([2, 2, 64]), "rows": np.array([2, -1])}
LOGITS = Node("Abs", ("x",), ("logits",), {})
BATCH = Node("Unsqueeze", ("x", "zero"), ("batched",), {})
ATTENDED = ("batched", "", "", "key.0", "value.0", "zero", "zero", "turn", "turn")
ATTRIBUTES = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "scale": 0.25}


def lowered(folder: Path, nodes: Sequence[Node], states: Sequence[StateSpec] = ()) -> tvm.IRModule:
    """Lower a graph for two tokens."""
    model = OnnxModel(tuple(nodes), CONSTANTS, {}, np.zeros(0, np.uint8))
    spec = GraphSpec(file="", weights="", inputs=SPEC.inputs, outputs=(), states=tuple(states))
    with PackedWeights(folder / "packed") as packed:
        return lower({DECODER: (model, spec)}, packed, family="portable", passes=[(2, 1)]).module


def refusal(folder: Path, nodes: Sequence[Node], states: Sequence[StateSpec] = ()) -> str:
    with pytest.raises(CompileError) as caught:
        lowered(folder, nodes, states)
    return str(caught.value)


def attention(
    attributes: Mapping[str, Any] = ATTRIBUTES, outputs: tuple[str, ...] = ("out", "next.key.0", "next.value.0")
) -> list[Node]:
    return [LOGITS, BATCH, Node("com.microsoft.GroupQueryAttention", ATTENDED, outputs, dict(attributes))]


def test_every_operator_with_a_lowering_says_what_it_takes() -> None:
    assert SIGNATURES.keys() == CONVERTERS.keys()


def test_caches_are_changed_in_place_by_attention(tmp_path: Path) -> None:
    module = lowered(tmp_path, attention(), [KEYS, VALUES])
    assert str(module["forward_2_1"]).count("call_tir_inplace") == 1


def test_halves_of_more_than_rows_are_gated_without_a_kernel_of_their_own(tmp_path: Path) -> None:
    nodes = [
        Node("Reshape", ("x", "cube"), ("cubes",), {}),
        Node("Split", ("cubes",), ("gate", "up"), {"axis": -1, "num_outputs": 2}),
        Node("Sigmoid", ("gate",), ("slope",), {}),
        Node("Mul", ("gate", "slope"), ("silu",), {}),
        Node("Mul", ("silu", "up"), ("gated",), {}),
        Node("Add", ("gated", "up"), ("sum",), {}),
        Node("Reshape", ("sum", "rows"), ("logits",), {}),
    ]
    assert "R.nn.silu" in str(lowered(tmp_path, nodes)["forward_2_1"])


def test_integers_are_added_as_integers(tmp_path: Path) -> None:
    nodes = [
        Node("Cast", ("x",), ("whole",), {"to": 7}),
        Node("Add", ("whole", "whole"), ("doubled",), {}),
        Node("Cast", ("doubled",), ("logits",), {"to": 1}),
    ]
    assert "int64" in str(lowered(tmp_path, nodes)["forward_2_1"])


def test_norms_of_other_axes_than_the_last_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, [Node("ReduceL2", ("x", "zero"), ("logits",), {})]) == (
        "ReduceL2 over axes [0] of (2, 128) is not supported, only over the last"
    )


@pytest.mark.parametrize("state", [KEYS, WINDOW], ids=["positional", "window"])
def test_a_state_that_no_kernel_changes_in_place_is_refused(tmp_path: Path, state: StateSpec) -> None:
    doubled = Node("Add", (state.name, state.name), (f"next.{state.name}",), {})
    assert refusal(tmp_path, [LOGITS, doubled], [state]) == (
        f"next.{state.name} is not {state.name} changed in place by a kernel; export the bundle again"
    )


def test_caches_in_each_others_place_are_refused(tmp_path: Path) -> None:
    swapped = attention(outputs=("out", "next.value.0", "next.key.0"))
    assert refusal(tmp_path, swapped, [KEYS, VALUES]) == (
        "next.key.0 is not key.0 changed in place by a kernel; export the bundle again"
    )


@pytest.mark.parametrize(
    ("nodes", "states", "missing"), [([LOGITS], [KEYS], "next.key.0"), ([BATCH], [], "logits")], ids=["state", "logits"]
)
def test_an_output_nothing_computes_is_named(
    tmp_path: Path, nodes: list[Node], states: list[StateSpec], missing: str
) -> None:
    assert refusal(tmp_path, nodes, states) == f"the graph computes no {missing}; export the bundle again"


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (
            Node("Add", ("x", "y"), ("logits",), {}),
            "Add takes ['y'], which no node before it makes; export the bundle again",
        ),
        (Node("ReduceSum", ("x",), ("logits",), {}), "ReduceSum lacks inputs [1]; export the bundle again"),
        (Node("Add", ("x", ""), ("logits",), {}), "Add lacks inputs [1]; export the bundle again"),
        (Node("Abs", ("x", "zero"), ("logits",), {}), "Abs takes ['zero'], which has no lowering"),
        (Node("Transpose", ("x",), ("logits",), {}), "Transpose lacks attributes ['perm']; export the bundle again"),
        (
            Node("Abs", ("x",), ("logits", "more"), {}),
            "Abs has outputs ['logits', 'more'], its lowering makes 1 of them",
        ),
        (
            Node("Gelu", ("x",), ("logits",), {"approximate": b"none"}),
            "Gelu has approximate b'none', kernels need one of (b'tanh',)",
        ),
        (
            Node("com.microsoft.BranchwiseRMSNorm", ("x",), ("logits",), {"num_branches": 0, "epsilon": 1e-6}),
            "com.microsoft.BranchwiseRMSNorm has num_branches 0, kernels need one of range(1, 2147483648)",
        ),
        (
            Node("Softmax", ("x",), ("logits",), {"temperature": 2.0}),
            "Softmax has attributes ['temperature'] without lowering; there are ['axis']",
        ),
    ],
    ids=lambda value: value.operator if isinstance(value, Node) else "",
)
def test_a_node_that_is_no_use_of_its_operator_is_refused(tmp_path: Path, node: Node, expected: str) -> None:
    assert refusal(tmp_path, [node]) == expected


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"scale": 0.0},
            "com.microsoft.GroupQueryAttention has scale 0, which means 1 / sqrt of its dimensions; write that number",
        ),
        (
            {"kv_num_heads": 4},
            "com.microsoft.GroupQueryAttention has kv_num_heads 4 over a cache of 2 heads; export the bundle again",
        ),
        (
            {"local_window_size": 0},
            "attention has a window of 0 tokens, kernels need at least 1; export the model again",
        ),
        (
            {"softcap": 2.0},
            "com.microsoft.GroupQueryAttention has attributes ['softcap'] without lowering; there are ['do_rotary', "
            "'kv_num_heads', 'local_window_size', 'num_heads', 'scale']",
        ),
    ],
    ids=["scale", "heads", "window", "softcap"],
)
def test_attention_the_kernels_do_not_compute_is_refused(
    tmp_path: Path, changed: dict[str, float], expected: str
) -> None:
    assert refusal(tmp_path, attention({**ATTRIBUTES, **changed}), [KEYS, VALUES]) == expected
