"""The machine code for Arm and RISC-V, run in an emulator, against numpy and the bits of x86's portable kernels."""

from collections.abc import Callable
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tests.emulated import EmulatedKernels
from tests.test_expert_kernels import stated_segments
from tests.test_kernels import (
    INPUTS,
    LEGAL_GROUPS,
    PLANES,
    block_weight,
    call,
    channel_scale,
    compile_kernels,
    hard_rows,
    int4_weight,
    int8_weight,
    joined,
    quantised_rows,
    same_bits,
)

from engram_compilers.kernels import (
    neon_dotprod,
    neon_dotprod_experts,
    neon_i8mm,
    neon_i8mm_experts,
    portable,
    portable_experts,
)
from engram_compilers.kernels.experts import Routing
from engram_targets import load_cpu_profile

Array = NDArray[Any]

OUTPUTS = 41  # two whole tiles and one of 9 outputs
ROWS = [1, 2, 7, 17]
TOKENS, EXPERTS, TOP_K = 5, 3, 2
FAMILIES = {
    "aarch64-dotprod": neon_dotprod,
    "aarch64-i8mm": neon_i8mm,
    "aarch64-i8mm-sve": neon_i8mm,
    "riscv64-rvv": portable,
}
EXPERT_FAMILIES = {neon_dotprod: neon_dotprod_experts, neon_i8mm: neon_i8mm_experts, portable: portable_experts}
ON_EACH_TARGET = pytest.mark.parametrize(
    "target",
    ["aarch64-dotprod", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in [*FAMILIES][1:])],
)
ROUTING = Routing(TOKENS, EXPERTS, TOP_K)


def prim_funcs(family: ModuleType) -> dict[str, Any]:
    found = {}
    for rows, planes in product(ROWS, PLANES):
        found[f"int8_{rows}_{planes}"] = family.linear_int8(rows, OUTPUTS, INPUTS, planes)
        found[f"int4_{rows}_{planes}"] = family.linear_int4(rows, OUTPUTS, INPUTS, planes)
    for bits in (4, 8):
        found[f"q{bits}"] = family.linear_block(3, OUTPUTS, INPUTS, bits)
    for kind in ("int8", "int4"):
        make: Callable[..., Any] = getattr(EXPERT_FAMILIES[family], f"expert_linear_{kind}")
        found[f"expert_{kind}"] = make(ROUTING, TOKENS, OUTPUTS, INPUTS)
    found["embed"] = family.embed_int8(3, OUTPUTS, 70)
    return found


@cache
def kernels(target: str) -> EmulatedKernels:
    return EmulatedKernels(prim_funcs(FAMILIES[target]), target)


@cache
def portable_kernels() -> dict[Any, Callable[..., None]]:
    wanted = ("q4", "q8", "expert_int8", "expert_int4", "embed")
    return compile_kernels({name: f for name, f in prim_funcs(portable).items() if name in wanted})


def int4_parts() -> tuple[Array, Array, Array]:
    codes, multiplier, zero = int4_weight()
    multiplier[0], zero[0] = LEGAL_GROUPS[-1]
    return codes[:OUTPUTS], multiplier[:OUTPUTS], zero[:OUTPUTS]


def linear(target: str, kind: str, quantised_x: list[Array]) -> tuple[Array, Array]:
    """Return what the emulated layer makes of rows, and what it should."""
    family = FAMILIES[target]
    planes, row_scale, _ = quantised_x
    rows = len(row_scale)
    if kind == "int8":
        weight = int8_weight(OUTPUTS, INPUTS).astype(np.int64) - 128
        packed = family.pack_int8(int8_weight(OUTPUTS, INPUTS))
    else:
        codes, multiplier, zero = (part.astype(np.int64) for part in int4_parts())
        weight = (codes - zero.repeat(32, axis=1)) * multiplier.repeat(32, axis=1)
        packed = family.pack_int4(*int4_parts())
    scale, y = channel_scale(OUTPUTS), np.full((rows, OUTPUTS), np.nan, np.float32)
    name = f"{kind}_{rows}_{len(planes) // rows}"
    expected = joined(planes, weight, rows) * scale * row_scale[:, None]
    return kernels(target)(name, *quantised_x, *packed.values(), scale, y)[-1], expected


@ON_EACH_TARGET
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_linear_layers_are_integer_sums_scaled_in_the_stated_order(
    target: str, kind: str, rows: int, planes: int
) -> None:
    assert same_bits(*linear(target, kind, quantised_rows(hard_rows(rows, INPUTS), planes)))


@ON_EACH_TARGET
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_products_of_both_signs_are_exact(target: str, kind: str) -> None:
    plane = np.zeros((4, 192), np.int8)
    plane[:, :INPUTS] = np.array([[-128], [127], [127], [-128]])
    quantised_x = [plane, np.ones(2, np.float32), -128 * plane.sum(axis=1, dtype=np.int32)]
    assert same_bits(*linear(target, kind, quantised_x))


def operands(family: ModuleType, name: str) -> list[Array]:
    if name == "embed":
        return [np.array([0, OUTPUTS - 1, 15]), family.pack_int8(int8_weight(OUTPUTS, 70))["weight"]]
    if name.startswith("q"):
        codes, scale = (part[:OUTPUTS] for part in block_weight(int(name[1])))
        packed = family.pack_block(codes, scale, int(name[1]))
        return [*quantised_rows(hard_rows(3, INPUTS), 2)[:2], *packed.values()]
    pack = getattr(EXPERT_FAMILIES[family], f"pack_{name}")
    parts = [int8_weight(OUTPUTS, INPUTS)] if name == "expert_int8" else list(int4_parts())
    packed = [pack(*(np.roll(part, expert, axis=0) for part in parts), channel_scale(OUTPUTS)) for expert in range(3)]
    slabs = [np.concatenate([expert[name] for expert in packed]) for name in packed[0]]
    chosen = np.array([[0, 2], [2, 0], [2, 1], [0, 2], [2, 0]])
    segments = [part.astype(np.int32) for part in stated_segments(chosen)]
    return [*quantised_rows(hard_rows(TOKENS, INPUTS), 2), *segments, *slabs]


@ON_EACH_TARGET
@pytest.mark.parametrize("name", ["q4", "q8", "expert_int8", "expert_int4", "embed"])
def test_other_layers_have_the_bits_of_the_portable_ones(target: str, name: str) -> None:
    shape = {"q": (3, OUTPUTS), "e": (ROUTING.pairs, OUTPUTS)}[name[0]] if name != "embed" else (3, 70)
    end = [channel_scale(OUTPUTS)] if name == "embed" else []
    y = np.full(shape, np.nan, np.float32)
    expected = call(portable_kernels()[name], *operands(portable, name), *end, y)[-1]
    assert same_bits(kernels(target)(name, *operands(FAMILIES[target], name), *end, y)[-1], expected)


def mnemonics(assembly: str) -> list[str]:
    return [line.split()[0] for line in assembly.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("target", "wanted", "unwanted"),
    [("aarch64-dotprod", "sdot", {"usdot", "usmmla", "ptrue"}), ("aarch64-i8mm", "usmmla", {"sdot", "usdot", "ptrue"})],
)
def test_products_are_the_familys_instruction(target: str, wanted: str, unwanted: set[str]) -> None:
    """No other one of bytes, and no SVE, which these profiles do not ask for."""
    found = mnemonics(kernels(target).assembly)
    assert found.count(wanted) > 1000
    assert not unwanted & set(found)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_of_matrices_are_half_as_many_instructions_as_dot_products(kind: str) -> None:
    """Of three rows in two planes, whose kernels cut the layer alike."""

    def multiplications(family: ModuleType, target: str, name: str) -> int:
        function = getattr(family, f"linear_{kind}")(3, 48, INPUTS, 2).with_attr("global_symbol", "layer")
        compiled = tvm.compile(
            tvm.IRModule({"layer": function}), tvm.target.Target(load_cpu_profile(target).llvm.target)
        )
        return mnemonics(compiled.mod.inspect_source("asm")).count(name)

    dots = multiplications(neon_dotprod, "aarch64-dotprod", "sdot")
    assert dots > 0
    assert 2 * multiplications(neon_i8mm, "aarch64-i8mm", "usmmla") == dots
