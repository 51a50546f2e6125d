"""The Arm families' machine code, run in an emulator, against numpy and against the portable kernels' bits."""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.arm64 import Arm64Kernels
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
ROWS = [1, 2, 4, 7, 17]
TOKENS, EXPERTS, TOP_K = 5, 3, 2
TARGETS = {neon_dotprod: "aarch64-dotprod", neon_i8mm: "aarch64-i8mm"}
EXPERT_FAMILIES = {neon_dotprod: neon_dotprod_experts, neon_i8mm: neon_i8mm_experts, portable: portable_experts}
FAMILIES = [pytest.param(family, id=name) for family, name in TARGETS.items()]
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
def kernels(family: ModuleType) -> Arm64Kernels:
    with TemporaryDirectory() as folder:
        return Arm64Kernels(prim_funcs(family), load_cpu_profile(TARGETS[family]).llvm.mcpu, Path(folder))


@cache
def portable_kernels() -> dict[Any, Callable[..., None]]:
    wanted = ("q4", "q8", "expert_int8", "expert_int4", "embed")
    return compile_kernels({name: f for name, f in prim_funcs(portable).items() if name in wanted})


def int4_parts() -> tuple[Array, Array, Array]:
    codes, multiplier, zero = int4_weight()
    multiplier[0], zero[0] = LEGAL_GROUPS[-1]
    return codes[:OUTPUTS], multiplier[:OUTPUTS], zero[:OUTPUTS]


def linear(family: ModuleType, kind: str, quantised_x: list[Array]) -> tuple[Array, Array]:
    """Return what the emulated layer makes of rows, and what it should."""
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
    return kernels(family)(name, *quantised_x, *packed.values(), scale, y)[-1], expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_linear_layers_are_integer_sums_scaled_in_the_stated_order(
    family: ModuleType, kind: str, rows: int, planes: int
) -> None:
    assert same_bits(*linear(family, kind, quantised_rows(hard_rows(rows, INPUTS), planes)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_products_of_both_signs_are_exact(family: ModuleType, kind: str) -> None:
    plane = np.zeros((4, 192), np.int8)
    plane[:, :INPUTS] = np.array([[-128], [127], [127], [-128]])
    quantised_x = [plane, np.ones(2, np.float32), -128 * plane.sum(axis=1, dtype=np.int32)]
    assert same_bits(*linear(family, kind, quantised_x))


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["q4", "q8", "expert_int8", "expert_int4", "embed"])
def test_other_layers_have_the_bits_of_the_portable_ones(family: ModuleType, name: str) -> None:
    shape = {"q": (3, OUTPUTS), "e": (ROUTING.pairs, OUTPUTS)}[name[0]] if name != "embed" else (3, 70)
    end = [channel_scale(OUTPUTS)] if name == "embed" else []
    y = np.full(shape, np.nan, np.float32)
    expected = call(portable_kernels()[name], *operands(portable, name), *end, y)[-1]
    assert same_bits(kernels(family)(name, *operands(family, name), *end, y)[-1], expected)


@pytest.mark.parametrize(
    ("family", "wanted", "unwanted"), [(neon_dotprod, "sdot", "usdot"), (neon_i8mm, "usdot", "sdot")]
)
def test_products_are_the_familys_instruction(family: ModuleType, wanted: str, unwanted: str) -> None:
    mnemonics = [line.split()[0] for line in kernels(family).assembly.splitlines() if line.strip()]
    assert mnemonics.count(wanted) > 1000
    assert unwanted not in mnemonics
    assert "ptrue" not in mnemonics  # SVE, which the profile does not ask for
