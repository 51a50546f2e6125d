"""Kernels for GPUs, run by pocl on the processor, against numpy statements of theirs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.opencl import Kernels, needs_opencl
from tvm import relax, tirx

from engram_compilers.kernels import gpu
from engram_compilers.kernels.experts import Routing
from engram_compilers.kernels.gpu import experts, float_linear, linear, packing
from engram_compilers.kernels.quantise import quantise_rows_numpy

pytestmark = needs_opencl

Floats = NDArray[np.float32]
EPS = 1e-5
OUTPUTS, INPUTS = 77, 96  # neither whole tiles of 32 nor whole steps of 128
SHAPES = [(3, 100, 1), (4, 192, 2)]  # rows, columns, planes
HEADS = [  # tokens, heads, kv heads, dimensions, capacity, position, window
    (1, 6, 3, 64, 512, 300, None),
    (2, 4, 1, 96, 300, 150, 40),
    (2, 2, 1, 256, 300, 129, None),
]
ROUTINGS = [Routing(3, 5, 2), Routing(1, 8, 3)]


def floats(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codes(bits: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 2**bits, shape, dtype=np.uint8)


def zeros(*shape: int) -> Floats:
    return np.zeros(shape, np.float32)


def close(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def _softmaxed() -> tirx.PrimFunc:
    """Return an operator of Relax's own whose schedule has several launches."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((3, 70), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.nn.softmax(x)))
    module = relax.transform.LegalizeOps()(builder.get())
    (function,) = (each for _, each in module.functions_items() if isinstance(each, tirx.PrimFunc))
    return function


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """Return all kernels of this file in one source, which a driver builds once."""
    made: dict[str, tirx.PrimFunc] = {"softmax": _softmaxed()}
    for m, k, p in SHAPES:
        made |= {
            f"quantise {m} {k} {p}": gpu.quantise.quantise_rows(m, k, p),
            f"norm {m} {k}": gpu.normalise.rms_norm(m, k, EPS),
            f"l2 {m} {k}": gpu.normalise.l2_norm(m, k),
            f"norm_quantise {m} {k} {p}": gpu.normalise.norm_quantise(m, k, EPS, p),
            f"add_norm_quantise {m} {k} {p}": gpu.normalise.add_norm_quantise(m, k, EPS, p),
            f"gated {m} {k}": gpu.activation.gated(m, k, gpu.activation.silu),
            f"gated_quantise {m} {k} {p}": gpu.activation.gated_quantise(m, k, gpu.activation.silu, p),
            f"int8 {m} {k} {p}": linear.linear_int8(m, OUTPUTS, k, p),
            f"float {m} {k}": float_linear.linear_float(m, OUTPUTS, k, "uint16"),
            f"embed {m} {k}": linear.embed_int8(m, OUTPUTS, k),
        }
    made |= {f"block{bits}": gpu.linear_block(4, OUTPUTS, INPUTS, bits) for bits in (4, 8)}
    made["int4"] = linear.linear_int4(4, OUTPUTS, INPUTS, 2)
    made |= {name: gpu.activation.each(300, getattr(gpu.activation, name)) for name in ("tanh", "gelu")}
    for t, h, kv, d, s, position, window in HEADS:
        made[f"append {position}"] = gpu.attention.rope_append(t, h, kv, d, s, min(d, 64))
        made[f"attend {position}"] = gpu.attention.attend(t, h, kv, d, s, 0.125, window)
    for routing in ROUTINGS:
        for name, normalise in (("route", True), ("share", False)):
            made[f"{name} {routing.name}"] = experts.route(routing, normalise=normalise)
        made[f"experts {routing.name}"] = experts.expert_linear_int8(routing, routing.tokens, OUTPUTS, INPUTS)
        made[f"combine {routing.name}"] = experts.combine(routing, 70)
    made["delta"] = gpu.recurrent.gated_delta(3, 2, 4, 16, 24, 0.25)
    made["conv"] = gpu.recurrent.causal_conv(3, 150, 3, 2, gpu.recurrent.ACTIVATIONS["none"])
    made["gate"] = gpu.streams.gate_value(2, 3, 70)
    return Kernels(made)


@pytest.mark.parametrize(("m", "k", "p"), SHAPES)
def test_rows_are_quantised_to_the_same_bits_as_on_a_processor(kernels: Kernels, m: int, k: int, p: int) -> None:
    x = floats(m, k)
    planes, scale, _ = quantise_rows_numpy(x, p)
    _, found, found_scale = kernels.run(f"quantise {m} {k} {p}", x, np.full_like(planes, 9), zeros(m))
    np.testing.assert_array_equal(found, planes)
    np.testing.assert_allclose(found_scale, scale, rtol=2e-7)


@pytest.mark.parametrize(("m", "k", "p"), SHAPES)
def test_an_int8_layer_sums_products_of_planes(kernels: Kernels, m: int, k: int, p: int) -> None:
    planes, scale, _ = quantise_rows_numpy(floats(m, k), p)
    weight, channel = codes(8, OUTPUTS, k), np.abs(floats(OUTPUTS))
    packed = packing.pack_int8(weight)["weight"]
    sums = planes[:, :k].astype(np.int64) @ (weight.astype(np.int64) - 128).T
    value = sums if p == 1 else 256 * sums[:m] + sums[m:]
    found = kernels.run(f"int8 {m} {k} {p}", planes, scale, packed, channel, zeros(m, OUTPUTS))[-1]
    np.testing.assert_allclose(found, value * channel * scale[:, None], rtol=1e-6)


@pytest.mark.parametrize(("m", "k", "p"), SHAPES)
def test_an_embedding_reads_the_same_packed_weight(kernels: Kernels, m: int, k: int, p: int) -> None:
    weight, channel = codes(8, OUTPUTS, k), floats(OUTPUTS)
    ids = np.arange(OUTPUTS - m, OUTPUTS)
    found = kernels.run(f"embed {m} {k}", ids, packing.pack_int8(weight)["weight"], channel, zeros(m, k))[-1]
    np.testing.assert_array_equal(found, (weight[ids].astype(np.float32) - 128) * channel[ids][:, None])


@pytest.mark.parametrize(("m", "k", "p"), SHAPES)
def test_a_float_layer_reads_bfloat16(kernels: Kernels, m: int, k: int, p: int) -> None:
    x, weight = floats(m, k), floats(OUTPUTS, k, seed=3)
    weight = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)
    packed = float_linear.pack_float(weight, "uint16")["weight"]
    close(kernels.run(f"float {m} {k}", x, packed, zeros(m, OUTPUTS))[-1], x.astype(np.float64) @ weight.T)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_layer_scales_each_group(kernels: Kernels, bits: int) -> None:
    planes, scale, _ = quantise_rows_numpy(floats(4, INPUTS), 2)
    weight, block_scale = codes(bits, OUTPUTS, INPUTS), floats(OUTPUTS, INPUTS // 32)
    packed = packing.pack_block(weight, block_scale, bits)
    dequantised = (weight.astype(np.float64) - 2 ** (bits - 1)) * np.repeat(block_scale, 32, axis=1)
    value = _joined(planes, 4) @ dequantised.T * scale[:, None]
    arguments = (planes, scale, packed["codes"], packed["block_scale"], zeros(4, OUTPUTS))
    np.testing.assert_allclose(kernels.run(f"block{bits}", *arguments)[-1], value, rtol=1e-4, atol=1e-4)


def test_an_int4_layer_unpacks_two_levels(kernels: Kernels) -> None:
    planes, scale, _ = quantise_rows_numpy(floats(4, INPUTS), 2)
    weight, channel = codes(4, OUTPUTS, INPUTS), np.abs(floats(OUTPUTS))
    multiplier, zero = codes(3, OUTPUTS, INPUTS // 32) + np.uint8(1), codes(4, OUTPUTS, INPUTS // 32)
    packed = packing.pack_int4(weight, multiplier, zero)
    integers = (weight.astype(np.int64) - np.repeat(zero, 32, axis=1)) * np.repeat(multiplier, 32, axis=1)
    value = _joined(planes, 4) @ integers.T * channel * scale[:, None]
    arguments = (planes, scale, packed["codes"], packed["header"], channel, zeros(4, OUTPUTS))
    np.testing.assert_allclose(kernels.run("int4", *arguments)[-1], value, rtol=1e-6)


def _joined(planes: NDArray[np.int8], rows: int) -> NDArray[np.float64]:
    high, low = (part[:, :INPUTS].astype(np.float64) for part in (planes[:rows], planes[rows:]))
    return 256 * high + low


@pytest.mark.parametrize(("m", "k", "p"), SHAPES)
def test_norms(kernels: Kernels, m: int, k: int, p: int) -> None:
    x, b, gain = floats(m, k), floats(m, k, seed=1), floats(k, seed=2)
    close(kernels.run(f"norm {m} {k}", x, gain, zeros(m, k))[-1], _normed(x, gain))
    close(kernels.run(f"l2 {m} {k}", x, zeros(m))[-1], np.linalg.norm(x, axis=1))
    planes, scale, _ = quantise_rows_numpy(_normed(x, gain), p)
    *_, found, found_scale = kernels.run(f"norm_quantise {m} {k} {p}", x, gain, np.full_like(planes, 9), zeros(m))
    _same_rows(found, found_scale, planes, scale, p)
    planes, scale, _ = quantise_rows_numpy(_normed(x + b, gain), p)
    arguments = (x, b, gain, zeros(m, k), np.full_like(planes, 9), zeros(m))
    *_, total, found, found_scale = kernels.run(f"add_norm_quantise {m} {k} {p}", *arguments)
    np.testing.assert_array_equal(total, x + b)
    _same_rows(found, found_scale, planes, scale, p)


def _normed(x: Floats, gain: Floats) -> Floats:
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS) * gain
    return np.asarray(normed, dtype=np.float32)


def _same_rows(found: NDArray[np.int8], scale: Floats, planes: NDArray[np.int8], wanted: Floats, count: int) -> None:
    """Check quantised rows against those of values that differ in their last bits: by one step."""
    np.testing.assert_allclose(scale, wanted, rtol=1e-5)
    rows = len(scale)
    steps = [np.split(each.astype(np.int64), count) for each in (found, planes)]
    values = [sum(part * 256 ** (count - 1 - i) for i, part in enumerate(parts)) for parts in steps]
    assert np.abs(np.subtract(*values)).max() <= 1
    assert values[0].shape[0] == rows


@pytest.mark.parametrize(("m", "k", "p"), SHAPES)
def test_gates(kernels: Kernels, m: int, k: int, p: int) -> None:
    gate_up = floats(m, 2 * k)
    gated = gate_up[:, :k] / (1 + np.exp(-gate_up[:, :k])) * gate_up[:, k:]
    close(kernels.run(f"gated {m} {k}", gate_up, zeros(m, k))[-1], gated)
    planes, scale, _ = quantise_rows_numpy(gated, p)
    _, found, found_scale = kernels.run(f"gated_quantise {m} {k} {p}", gate_up, np.full_like(planes, 9), zeros(m))
    _same_rows(found, found_scale, planes, scale, p)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", np.tanh),
        ("gelu", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_functions_of_each_value(kernels: Kernels, name: str, function: Callable[[Floats], Floats]) -> None:
    x = np.concatenate([floats(296) * 4, np.array([0, -100, 100, np.nan], np.float32)])
    close(kernels.run(name, x, zeros(300))[-1], function(x))


@pytest.mark.parametrize(("t", "h", "kv", "d", "s", "position", "window"), HEADS)
def test_attention(
    kernels: Kernels, t: int, h: int, kv: int, d: int, s: int, position: int, window: int | None
) -> None:
    query, keys, values = floats(t, h * d), floats(1, kv, s, d, seed=1), floats(1, kv, s, d, seed=2)
    at = np.array([position])
    found = kernels.run(f"attend {position}", query, keys, values, at, zeros(t, h * d))[-1]
    wanted = np.empty((t, h, d))
    for token, head in np.ndindex(t, h):
        reach = slice(max(0, position + token + 1 - (window or s)), position + token + 1)
        scores = keys[0, head // (h // kv), reach].astype(np.float64) @ query[token, head * d : (head + 1) * d] * 0.125
        weights = np.exp(scores - scores.max())
        wanted[token, head] = weights @ values[0, head // (h // kv), reach] / weights.sum()
    close(found, wanted.reshape(t, h * d))


@pytest.mark.parametrize(("t", "h", "kv", "d", "s", "position", "window"), HEADS)
def test_appending(
    kernels: Kernels, t: int, h: int, kv: int, d: int, s: int, position: int, window: int | None
) -> None:
    half, rows = min(d, 64) // 2, slice(position, position + t)
    qkv, cos, sin = floats(t, (h + 2 * kv) * d), floats(s, half, seed=1), floats(s, half, seed=2)
    keys, values = floats(1, kv, s, d, seed=3), floats(1, kv, s, d, seed=4)
    arguments = (qkv, cos, sin, np.array([position]), keys, values, zeros(t, h * d))
    *_, new_keys, new_values, query = kernels.run(f"append {position}", *arguments)
    heads = qkv.reshape(t, h + 2 * kv, d)
    c, sn = cos[rows, None], sin[rows, None]
    turned = heads.copy()
    turned[..., :half] = heads[..., :half] * c - heads[..., half : 2 * half] * sn
    turned[..., half : 2 * half] = heads[..., half : 2 * half] * c + heads[..., :half] * sn
    close(query.reshape(t, h, d), turned[:, :h])
    keys[0, :, rows], values[0, :, rows] = turned[:, h : h + kv].swapaxes(0, 1), heads[:, h + kv :].swapaxes(0, 1)
    close(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_are_chosen_and_ordered(kernels: Kernels, routing: Routing) -> None:
    logits = floats(routing.tokens, routing.experts)
    logits[0, 1] = logits[0, 2] = 5.0  # of equal ones the lower comes first
    order, expert, start, count, weight = _routed(kernels, "route", routing, logits)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : routing.top_k].reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(chosen, kind="stable"))
    used, starts = np.unique(np.sort(chosen), return_index=True)
    assert count[0] == len(used)
    np.testing.assert_array_equal(expert[: len(used)], used)
    np.testing.assert_array_equal(start[: len(used) + 1], [*starts, routing.pairs])
    exponentials = np.exp(np.take_along_axis(logits, chosen.reshape(routing.tokens, -1), axis=1))
    close(weight, exponentials / exponentials.sum(axis=1, keepdims=True))
    share = _routed(kernels, "share", routing, logits)[-1]
    close(share, exponentials / np.exp(logits).sum(axis=1, keepdims=True))


def _routed(kernels: Kernels, name: str, routing: Routing, logits: Floats) -> list[NDArray[Any]]:
    bounds = [np.zeros(size, np.int32) for size in (routing.pairs, routing.segments + 1, routing.segments + 1, 1)]
    return list(kernels.run(f"{name} {routing.name}", logits, *bounds, zeros(routing.tokens, routing.top_k))[1:])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_chosen_experts_layers_and_their_mixture(kernels: Kernels, routing: Routing) -> None:
    planes, scale, _ = quantise_rows_numpy(floats(routing.tokens, INPUTS), 2)
    logits, weights = floats(routing.tokens, routing.experts), codes(8, routing.experts, OUTPUTS, INPUTS)
    channel = np.abs(floats(routing.experts, OUTPUTS))
    packed = np.concatenate([experts.pack_expert_int8(each, channel[0])["weight"] for each in weights])
    *segments, _ = _routed(kernels, "route", routing, logits)
    y = zeros(routing.pairs, OUTPUTS)
    found = kernels.run(f"experts {routing.name}", planes, scale, *segments, packed, channel.reshape(-1), y)[-1]
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : routing.top_k].reshape(-1)
    rows = np.repeat(np.arange(routing.tokens), routing.top_k)
    values = (_joined(planes, routing.tokens) * scale[:, None])[rows]
    wanted = np.einsum("pk,pnk->pn", values, weights[chosen] - 128.0) * channel[chosen]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)
    parts, shares = floats(routing.pairs, 70), floats(routing.tokens, routing.top_k, seed=5)
    mixed = (parts.reshape(routing.tokens, routing.top_k, 70) * shares[..., None]).sum(axis=1)
    close(kernels.run(f"combine {routing.name}", parts, shares, zeros(routing.tokens, 70))[-1], mixed)


def test_the_gated_delta_rule(kernels: Kernels) -> None:
    query, key, value = floats(3, 2 * 16), floats(3, 2 * 16, seed=1), floats(3, 4 * 24, seed=2)
    decay, beta, state = -np.abs(floats(3, 4, seed=3)), floats(3, 4, seed=4), floats(1, 4, 16, 24, seed=5)
    *_, found_state, found = kernels.run("delta", query, key, value, decay, beta, state, zeros(3, 4 * 24))
    memory, wanted = state[0].astype(np.float64), np.empty((3, 4, 24))
    for t, head in np.ndindex(3, 4):
        part = slice(head // 2 * 16, head // 2 * 16 + 16)
        memory[head] *= np.exp(decay[t, head])
        delta = (value[t, head * 24 : head * 24 + 24] - memory[head].T @ key[t, part]) * beta[t, head]
        memory[head] += np.outer(key[t, part], delta)
        wanted[t, head] = 0.25 * memory[head].T @ query[t, part]
    close(found, wanted.reshape(3, -1))
    close(found_state[0], memory)


def test_a_causal_convolution_moves_its_window_on(kernels: Kernels) -> None:
    x, weight, window = floats(3, 150), floats(3, 150, seed=1), floats(4, 150, seed=2)
    *_, found_window, found = kernels.run("conv", x, weight, window, zeros(3, 150))
    steps = np.concatenate([window, x])
    close(found, sum(weight[tap] * steps[2 * tap : 2 * tap + 3] for tap in range(3)))
    np.testing.assert_array_equal(found_window, steps[3:])


def test_the_gate_of_a_memory_in_several_streams(kernels: Kernels) -> None:
    key, query, value = floats(2, 210), floats(2, 210, seed=1), floats(2, 70, seed=2)
    score = (key * query).reshape(2, 3, 70).sum(axis=2) / np.sqrt(70)
    gate = 1 / (1 + np.exp(-np.sign(score) * np.sqrt(np.maximum(np.abs(score), 1e-6))))
    close(kernels.run("gate", key, query, value, zeros(2, 210))[-1], (gate[..., None] * value[:, None]).reshape(2, -1))


def test_an_operator_of_relax_passes_on_what_its_launches_leave(kernels: Kernels) -> None:
    x = floats(3, 70)
    exponentials = np.exp(x)
    close(kernels.run("softmax", x, zeros(3, 70))[-1], exponentials / exponentials.sum(axis=1, keepdims=True))
