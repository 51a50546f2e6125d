"""Kernels of routed experts against numpy; the bits of a pair depend on nothing but its token and its expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tests.test_kernels import (
    LEGAL_GROUPS,
    call,
    compile_kernels,
    floats,
    hard_rows,
    joined,
    needs_avx2,
    needs_avx_vnni,
    needs_vnni,
    processor,
    same_bits,
)

from engram_compilers.kernels import (
    avx2_experts,
    avx512_vnni_experts,
    avx_vnni_experts,
    experts,
    float_linear,
    loops,
    portable_experts,
    quantise,
)
from engram_compilers.kernels.experts import Routing
from engram_runtime.errors import CompileError

Array = NDArray[Any]

TOKENS, EXPERTS, TOP_K = 9, 7, 3
FEWER_TOKENS = [1, 2, 5, *(pytest.param(tokens, marks=pytest.mark.exhaustive) for tokens in (3, 4, 6, 7, 8))]
X86_FAMILIES = [
    pytest.param(avx512_vnni_experts, marks=needs_vnni),
    pytest.param(avx_vnni_experts, marks=needs_avx_vnni),
    pytest.param(avx2_experts, marks=needs_avx2),
]
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
def linear(family: ModuleType, kind: str, tokens: int, rows: int) -> Any:
    """Return the kernel of so many tokens with a row for each token or for each pair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "PARALLEL_FROM_US", 0.0)
        kernel = make_kernel(family, kind)(Routing(tokens, EXPERTS, TOP_K), rows, OUTPUTS, INPUTS)
    return compile_kernels({0: kernel}, processor(family))[0]


def apply(family: ModuleType, kind: str, x: Array, chosen: Array, packed: Sequence[Array]) -> Array:
    """Run one layer on rows of tokens or of pairs."""
    order, expert, start, count = (part.astype(np.int32) for part in stated_segments(chosen))
    size = min(chosen.size, EXPERTS) + 1
    segments = [order, np.resize(expert, size), np.resize(start, size), count]
    operands = [x] if kind == "float" else list(quantise.quantise_rows_numpy(x, quantise.MOST_PLANES))
    y = np.full((chosen.size, OUTPUTS), np.nan, np.float32)
    return call(linear(family, kind, len(chosen), len(x)), *operands, *segments, *packed, y)[-1]


with_layers = pytest.mark.parametrize(
    ("family", "kind"),
    [
        (portable_experts, "float"),
        (portable_experts, "int8"),
        (portable_experts, "int4"),
        *(
            pytest.param(*family.values, kind, marks=family.marks)
            for family in X86_FAMILIES
            for kind in ("int8", "int4")
        ),
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__.rsplit(".", 1)[1],
)


def stated_linear(experts_layer: Layer, x: Array, expert_of_pair: Array, per_row: int) -> Array:
    planes, row_scale, _ = quantise.quantise_rows_numpy(x, quantise.MOST_PLANES)
    every = [
        joined(planes, weight, len(x)) * scale * row_scale[:, None]
        for weight, scale in zip(experts_layer.weight, experts_layer.scale, strict=True)
    ]
    return np.stack([every[expert][pair // per_row] for pair, expert in enumerate(expert_of_pair)])


def routed(tokens: int) -> Array:
    return chosen_experts(Routing(tokens, EXPERTS, TOP_K), floats(TOKENS, EXPERTS, seed=6)[:tokens])


@with_layers
@pytest.mark.parametrize("per_row", [1, TOP_K])
def test_a_pairs_row_is_its_experts_linear_layer(family: ModuleType, kind: str, per_row: int) -> None:
    """Of integer weights: their sums, scaled in the stated order."""
    experts_layer, chosen = layer(kind), routed(TOKENS)
    x = hard_rows(TOKENS * TOP_K // per_row, INPUTS)
    found = apply(family, kind, x, chosen, experts_layer.packed(family))
    if kind != "float":
        assert same_bits(found, stated_linear(experts_layer, x, chosen.ravel(), per_row))
        return
    weight = experts_layer.weight.astype(np.float64) * experts_layer.scale[:, :, None]
    expected = np.einsum("pk,pnk->pn", np.repeat(x, per_row, axis=0), weight[chosen.ravel()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@with_layers
@pytest.mark.parametrize("tokens", FEWER_TOKENS)
def test_a_tokens_bits_do_not_depend_on_the_others(family: ModuleType, kind: str, tokens: int) -> None:
    packed, x = layer(kind).packed(family), floats(TOKENS, INPUTS)
    together = apply(family, kind, x, routed(TOKENS), packed)
    assert same_bits(apply(family, kind, x[:tokens], routed(tokens), packed), together[: tokens * TOP_K])


@pytest.mark.parametrize("family", X86_FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_all_families_give_the_same_bits(family: ModuleType, kind: str) -> None:
    x = floats(TOKENS, INPUTS)
    expected, found = (
        apply(each, kind, x, routed(TOKENS), layer(kind).packed(each)) for each in (portable_experts, family)
    )
    assert same_bits(found, expected)


@pytest.mark.parametrize("family", [portable_experts, *X86_FAMILIES])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_expert_may_have_any_number_of_pairs(family: ModuleType, kind: str) -> None:
    """The first tokens share their experts: blocks of pairs of all sizes, and all that can be left over."""
    packed, x = layer(kind).packed(family), floats(TOKENS, INPUTS)
    for shared in range(1, TOKENS + 1):
        chosen = routed(TOKENS)
        chosen[:shared] = [5, 3, 1]
        alone = [apply(family, kind, x[t : t + 1], chosen[t : t + 1], packed) for t in range(TOKENS)]
        assert same_bits(apply(family, kind, x, chosen, packed), np.concatenate(alone))


@with_layers
def test_experts_no_token_chose_can_hold_anything(family: ModuleType, kind: str) -> None:
    packed, x, chosen = layer(kind).packed(family), floats(1, INPUTS), routed(1)
    expected = apply(family, kind, x, chosen, packed)
    unread = np.setdiff1d(np.arange(EXPERTS), chosen)
    for array in packed:
        array.reshape(EXPERTS, -1)[unread] = np.nan if array.dtype == np.float32 else 99
    assert same_bits(apply(family, kind, x, chosen, packed), expected)


@pytest.mark.parametrize("family", [portable_experts, *X86_FAMILIES])
def test_a_slab_may_have_more_elements_than_32_bits_count(family: ModuleType, tmp_path: Path) -> None:
    """A sparse file of 2049 experts of 1 MiB, of which the last one is written and read."""
    count, outputs, inputs = 2049, 16, 65536
    prim_func = family.expert_linear_int8(Routing(1, count, 1), 1, outputs, inputs)
    kernel = compile_kernels({0: prim_func}, processor(family))[0]
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
    small = [*quantise.quantise_rows_numpy(x, quantise.MOST_PLANES), *(np.array(part, np.int32) for part in segments)]
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
