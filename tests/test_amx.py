"""AMX kernels give the bits of the other families, on AMX or on an emulator whose instructions are tested first."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm
from tests import amx_machine, test_expert_kernels
from tests.amx_machine import Kind, Watch, address_of, amx, configuration, stored_configuration
from tests.test_expert_kernels import EXPERTS, TOP_K, chosen_experts, stated_segments
from tests.test_kernels import (
    INPUTS,
    LEGAL_GROUPS,
    OUTPUTS,
    Array,
    call,
    channel_scale,
    compile_kernels,
    floats,
    hard_rows,
    int4_weight,
    int8_weight,
    joined,
    same_bits,
)
from tests.tiny import TinyModel, TinySite
from tests.tiny_families import FAMILIES
from tests.workshop import Workshop, bundle_logits, random_ids

from engram_compilers.kernels import amx as amx_family
from engram_compilers.kernels import amx_experts, avx512_vnni, avx512_vnni_experts, loops
from engram_compilers.kernels.experts import Routing
from engram_compilers.kernels.packing import GROUP
from engram_compilers.kernels.quantise import MOST_PLANES, quantise_rows_numpy
from engram_runtime.bundle import Bundle

pytestmark = pytest.mark.skipif(not amx_machine.CAN_RUN, reason="this machine's processor has no avx512_vnni")
on_emulator = pytest.mark.skipif(amx_machine.NATIVE, reason="a processor does not say what it has carried out")

# Linear layers

USUAL_ROWS = [1, 2, 3, 8, 9, 15, 16, 17, 33, 64]  # of one tile and two, whole ones and cut ones
OTHER_ROWS = [4, 5, 6, 7, 10, 11, 12, 13, 14, 32]
ROWS = [*USUAL_ROWS, *(pytest.param(rows, marks=pytest.mark.exhaustive) for rows in OTHER_ROWS)]
FEW_ROWS = [2, 9, 17, 64]
ROWS_OF_ONE_PLANE = [1, 2, 16, 17, 31, 33, 64]
CUT_OUTPUTS, CUT_INPUTS = 15, 70  # fewer outputs than a tile has, inputs not of whole groups


def compile_tiles(kernels: dict[Any, Any]) -> dict[Any, Callable[..., None]]:
    """Compile PrimFuncs so that AMX instructions are all an AVX512-VNNI machine lacks."""
    names = {key: f"kernel_{i}" for i, key in enumerate(kernels)}
    module = tvm.IRModule({names[key]: f.with_attr("global_symbol", names[key]) for key, f in kernels.items()})
    target = {"kind": "llvm", "mcpu": "cascadelake", "mattr": ["+amx-tile", "+amx-int8"]}
    executable = tvm.compile(module, tvm.target.Target(target))
    amx()
    return {key: executable[name] for key, name in names.items()}


@cache
def linears(rows: int, planes: int) -> dict[str, Callable[..., None]]:
    """Kernels by kind, all of them parallel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "PARALLEL_FROM_US", 0.0)
        kernels = {
            "int8": amx_family.linear_int8(rows, OUTPUTS, INPUTS, planes),
            "int4": amx_family.linear_int4(rows, OUTPUTS, INPUTS, planes),
        }
        if rows in FEW_ROWS and planes == 2:
            kernels["cut"] = amx_family.linear_int8(rows, CUT_OUTPUTS, CUT_INPUTS, 2)
    return compile_tiles(kernels)


def packed_weight(family: ModuleType, kind: str) -> list[Array]:
    match kind:
        case "int8":
            packed = family.pack_int8(int8_weight(OUTPUTS, INPUTS))
        case "int4":
            packed = family.pack_int4(*every_group())
        case _:
            packed = family.pack_int8(int8_weight(CUT_OUTPUTS, CUT_INPUTS))
    return list(packed.values())


def every_group() -> tuple[Array, Array, Array]:
    """Return codes, multipliers and zeros: every pair of the two that is legal takes part."""
    codes, _, _ = int4_weight()
    chosen = np.resize(LEGAL_GROUPS, (OUTPUTS, INPUTS // GROUP, 2)).astype(np.uint8)
    return codes, chosen[..., 0], chosen[..., 1]


def integer_weight(kind: str) -> Array:
    if kind == "int4":
        codes, multiplier, zero = (part.astype(np.int64) for part in every_group())
        wide: Array = (codes - zero.repeat(GROUP, axis=1)) * multiplier.repeat(GROUP, axis=1)
        return wide
    return int8_weight(*((OUTPUTS, INPUTS) if kind == "int8" else (CUT_OUTPUTS, CUT_INPUTS))).astype(np.int64) - 128


def run_linear(kernel: Callable[..., None], kind: str, activations: list[Array]) -> Array:
    """Run a layer on planes, row scales and plane offsets."""
    outputs = CUT_OUTPUTS if kind == "cut" else OUTPUTS
    y = np.full((len(activations[1]), outputs), np.nan, np.float32)
    return call(kernel, *activations, *packed_weight(amx_family, kind), channel_scale(outputs), y)[-1]


def extreme_planes(rows: int, planes: int, inputs: int = INPUTS) -> list[Array]:
    """Return planes with rows of -128 and of 127 among random ones, row scales and plane offsets."""
    rng = np.random.default_rng(rows)
    values = np.zeros((planes * rows, loops.round_up(inputs, 64)), np.int8)
    values[:, :inputs] = rng.integers(-128, 128, (planes * rows, inputs))
    values[0, :inputs], values[-1, :inputs] = -128, 127
    scale = rng.uniform(0.001, 0.1, rows).astype(np.float32)
    return [values, scale, -128 * values.sum(axis=1, dtype=np.int32)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_two_planes_give_the_integer_sums_scaled_in_the_stated_order(kind: str, rows: int) -> None:
    assert same_bits(*two_planes(kind, rows))


@pytest.mark.parametrize("rows", FEW_ROWS)
def test_a_layer_may_be_smaller_than_a_tile(rows: int) -> None:
    assert same_bits(*two_planes("cut", rows))


def two_planes(kind: str, rows: int) -> tuple[Array, Array]:
    """Return what a layer makes of extreme rows, and what it should."""
    activations = extreme_planes(rows, 2, CUT_INPUTS if kind == "cut" else INPUTS)
    weight = integer_weight(kind)
    expected = joined(activations[0], weight, rows) * channel_scale(len(weight)) * activations[1][:, None]
    return run_linear(linears(rows, 2)[kind], kind, activations), expected


@pytest.mark.parametrize("rows", ROWS_OF_ONE_PLANE)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_plane_gives_the_integer_sums_scaled_in_the_stated_order(kind: str, rows: int) -> None:
    activations = extreme_planes(rows, 1)
    sums = activations[0][:, :INPUTS].astype(np.int64) @ integer_weight(kind).T
    expected = sums.astype(np.float32) * channel_scale(OUTPUTS) * activations[1][:, None]
    assert same_bits(run_linear(linears(rows, 1)[kind], kind, activations), expected)


@cache
def vnni_linears() -> dict[Any, Callable[..., None]]:
    kernels = {("int8", rows): avx512_vnni.linear_int8(rows, OUTPUTS, INPUTS, 2) for rows in FEW_ROWS}
    return compile_kernels(
        kernels | {("int4", rows): avx512_vnni.linear_int4(rows, OUTPUTS, INPUTS, 2) for rows in FEW_ROWS}
    )


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tiles_give_the_bits_of_avx512_vnni_on_its_own_packed_weights(kind: str, rows: int) -> None:
    activations: list[Array] = list(quantise_rows_numpy(hard_rows(rows, INPUTS), MOST_PLANES))
    found = run_linear(linears(rows, 2)[kind], kind, activations)
    y = np.full((rows, OUTPUTS), np.nan, np.float32)
    arrays = [*activations, *packed_weight(avx512_vnni, kind), channel_scale(OUTPUTS), y]
    assert same_bits(found, call(vnni_linears()[kind, rows], *arrays)[-1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_threads_do_not_change_a_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "PARALLEL_FROM_US", np.inf)
    kernel = getattr(amx_family, f"linear_{kind}")(33, OUTPUTS, INPUTS, 2)
    assert "T.parallel" not in kernel.script()
    serial, activations = compile_tiles({0: kernel})[0], extreme_planes(33, 2)
    assert same_bits(run_linear(linears(33, 2)[kind], kind, activations), run_linear(serial, kind, activations))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tiles_in_another_shape_do_not_matter_and_are_given_back(kind: str) -> None:
    activations = extreme_planes(8, 2)
    expected = run_linear(linears(8, 2)[kind], kind, activations)
    amx().amx_configure(address_of(configuration({0: (3, 8), 7: (1, 4)})))
    assert same_bits(run_linear(linears(8, 2)[kind], kind, activations), expected)
    np.testing.assert_array_equal(stored_configuration(), np.zeros(64, np.uint8))


# How often weights are read


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch(most_loads=4096)
    yield watch
    watch.close()


def watched_loads(watch: Watch, rows: int, planes: int) -> Array:
    """Return the numbers of the tiles of an int8 weight that a call loads, in order, on one thread."""
    weight = avx512_vnni.pack_int8(int8_weight(OUTPUTS, INPUTS))["weight"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "PARALLEL_FROM_US", np.inf)
        kernel = compile_tiles({0: amx_family.linear_int8(rows, OUTPUTS, INPUTS, planes)})[0]
    tensor = tvm.runtime.tensor(weight)
    others = [tvm.runtime.tensor(array) for array in (*extreme_planes(rows, planes), channel_scale(OUTPUTS))]
    y = tvm.runtime.tensor(np.zeros((rows, OUTPUTS), np.float32))
    kernel(*others[:3], tensor, others[3], y)
    return watch.loads_from(np.asarray(np.from_dlpack(tensor), np.uint8)) // 1024


WEIGHT_TILES = 13 * 3  # of 16 outputs and of 64 inputs


@on_emulator
@pytest.mark.parametrize(("rows", "planes"), [(2, 2), (8, 2), (9, 2), (16, 2), (2, 1), (16, 1), (17, 1), (32, 1)])
def test_up_to_32_plane_rows_load_every_tile_of_the_weight_once(watch: Watch, rows: int, planes: int) -> None:
    assert sorted(watched_loads(watch, rows, planes)) == list(range(WEIGHT_TILES))
    assert watch.count(Kind.TDPB) == WEIGHT_TILES * (1 if rows * planes <= 16 else 2)


@on_emulator
@pytest.mark.parametrize(("rows", "planes", "blocks"), [(17, 2, 2), (32, 2, 2), (64, 2, 4), (64, 1, 2)])
def test_more_rows_load_a_pair_of_tiles_again_before_they_go_on(
    watch: Watch, rows: int, planes: int, blocks: int
) -> None:
    """Two tiles of outputs are 32 bytes an input, which the cache holds: memory is read once."""
    loads = watched_loads(watch, rows, planes)
    pairs = loads // (2 * 3)
    assert (np.diff(pairs) >= 0).all()
    assert np.bincount(loads).tolist() == [blocks] * WEIGHT_TILES


@on_emulator
def test_every_share_of_a_call_configures_the_tiles_of_its_thread_and_gives_them_back(watch: Watch) -> None:
    run_linear(linears(17, 2)["int8"], "int8", extreme_planes(17, 2))
    assert [watch.count(kind) for kind in (Kind.LDTILECFG, Kind.TILERELEASE)] == [7, 7]  # groups of two tiles


# Experts

# A few rows of a tile, all of one, some of two, more than two; once, the pairs of a token share its row of x.
TOKENS_AND_SHARING = [(2, 1), (8, 1), (9, 1), (9, TOP_K), (24, 1)]


@cache
def expert_linears(family: ModuleType) -> dict[Any, Callable[..., None]]:
    """Kernels by kind, tokens and pairs that share a row of x."""
    kernels = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "PARALLEL_FROM_US", 0.0)
        for kind, (tokens, per_row) in product(("int8", "int4"), TOKENS_AND_SHARING):
            routing, make = Routing(tokens, EXPERTS, TOP_K), getattr(family, f"expert_linear_{kind}")
            sizes = (routing.pairs // per_row, test_expert_kernels.OUTPUTS, test_expert_kernels.INPUTS)
            kernels[kind, tokens, per_row] = make(routing, *sizes)
    return compile_tiles(kernels)


def run_experts(family: ModuleType, kind: str, tokens: int, per_row: int, packed: list[Array]) -> Array:
    routing = Routing(tokens, EXPERTS, TOP_K)
    chosen = chosen_experts(routing, floats(tokens, EXPERTS, seed=6))
    order, expert, start, count = (part.astype(np.int32) for part in stated_segments(chosen))
    segments = [order, np.resize(expert, routing.segments + 1), np.resize(start, routing.segments + 1), count]
    activations = quantise_rows_numpy(floats(routing.pairs // per_row, test_expert_kernels.INPUTS), MOST_PLANES)
    y = np.full((routing.pairs, test_expert_kernels.OUTPUTS), np.nan, np.float32)
    return call(expert_linears(family)[kind, tokens, per_row], *activations, *segments, *packed, y)[-1]


@pytest.mark.parametrize(("tokens", "per_row"), TOKENS_AND_SHARING)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_on_tiles_give_the_bits_of_avx512_vnni(kind: str, tokens: int, per_row: int) -> None:
    packed = test_expert_kernels.layer(kind).packed(avx512_vnni_experts)
    tiles, vnni = (run_experts(family, kind, tokens, per_row, packed) for family in (amx_experts, avx512_vnni_experts))
    assert same_bits(tiles, vnni)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_no_token_chose_can_hold_anything(kind: str) -> None:
    packed = test_expert_kernels.layer(kind).packed(amx_experts)
    expected = run_experts(amx_experts, kind, 2, 1, packed)
    chosen = chosen_experts(Routing(2, EXPERTS, TOP_K), floats(2, EXPERTS, seed=6))
    for array in packed:
        unread = np.setdiff1d(np.arange(EXPERTS), chosen)
        array.reshape(EXPERTS, -1)[unread] = np.nan if array.dtype == np.float32 else 99
    assert same_bits(run_experts(amx_experts, kind, 2, 1, packed), expected)


# Models


LESS_USUAL = ["int4", "mixtral"]


def quantised_bundle(workshop: Workshop, name: str) -> Bundle:
    match name:
        case "int8":
            return workshop.uncompiled()
        case "int4":
            return workshop.bundle(workshop.checkpoint(TinyModel(tied=False), TinySite()), quant="int4")
        case _:
            return workshop.bundle(workshop.family(FAMILIES["mixtral"][0]), quant="int4")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LESS_USUAL)])
def test_a_model_on_tiles_gives_the_logits_of_avx512_vnni_bit_for_bit(workshop: Workshop, name: str) -> None:
    """20 tokens at once, then two, then one."""
    bundle = quantised_bundle(workshop, name)
    counts: dict[str, Any] = {"decode_tokens": (1, 2), "prefill_tokens": (20,)}
    tiles = workshop.compiled(bundle, "amx", mcpu="sapphirerapids", **counts)
    vnni = workshop.compiled(bundle, "avx512_vnni", **counts)
    amx()
    found, expected = (bundle_logits(compiled, random_ids(23), "tvm") for compiled in (tiles, vnni))
    assert same_bits(found, expected)
