"""Kernels that do several steps at once have the bits of those steps one after the other."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.test_kernels import Array, call, compile_kernels, floats, hard_rows, same_bits

from engram_compilers.kernels import activation, normalise, quantise

PLANES = [1, 2]
# Rows and columns: each of both, the other pairs of them where there is time.
PAIRED = [(1, 64), (1, 77), (3, 77), (3, 9), (17, 160)]
OTHERS = [(1, 9), (1, 160), (3, 64), (3, 160), (17, 9), (17, 64), (17, 77)]
SIZES = [*PAIRED, *(pytest.param(size, marks=pytest.mark.exhaustive) for size in OTHERS)]
EPS = 1e-5
GATES = {"silu": activation.silu, "gelu": activation.gelu}


@cache
def kernels(size: tuple[int, int]) -> dict[Any, Callable[..., None]]:
    made: dict[Any, Any] = {("norm", size): normalise.rms_norm(*size, EPS), ("add", size): activation.add(*size)}
    for name, gate in GATES.items():
        made[name, size] = activation.gated(*size, gate)
    for planes in PLANES:
        made["quantise", size, planes] = quantise.quantise_rows(*size, planes)
        made["norm_quantise", size, planes] = normalise.norm_quantise(*size, EPS, planes)
        made["add_norm_quantise", size, planes] = normalise.add_norm_quantise(*size, EPS, planes)
        for name, gate in GATES.items():
            made[f"{name}_quantise", size, planes] = activation.gated_quantise(*size, gate, planes)
    return compile_kernels(made)


def run(key: Any, inputs: Sequence[Array], shape: tuple[int, int]) -> Array:
    return call(kernels(shape)[key], *inputs, np.zeros(shape, np.float32))[-1]


def run_quantised(key: Any, inputs: Sequence[Array], shape: tuple[int, int], planes: int) -> list[Array]:
    types = quantise.quantised_types(*shape, planes)
    filled = [np.full(size, 99, dtype) for size, dtype in types]
    return call(kernels(shape)[key], *inputs, *filled)[len(inputs) :]


def all_same(found: Sequence[Array], expected: Sequence[Array]) -> bool:
    return [same_bits(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("planes", PLANES)
def test_quantise_rows_is_its_numpy_statement(size: tuple[int, int], planes: int) -> None:
    x = hard_rows(*size)
    found = run_quantised(("quantise", size, planes), [x], size, planes)
    assert all_same(found, quantise.quantise_rows_numpy(x, planes))


def test_one_plane_holds_8_bits_of_every_row() -> None:
    x = hard_rows(17, 49)
    plane, row_scale, _ = quantise.quantise_rows_numpy(x, 1)
    assert (plane.min(), plane.max()) == (-127, 127)
    # Half a step, and 127 * 2^-22 of a step for the roundings of x * (127 / peak).
    assert np.all(np.abs(plane[:, :49] * row_scale[:, None] - x).max(axis=1) <= 0.50004 * row_scale)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("planes", PLANES)
def test_norm_quantise_is_rms_norm_then_quantise(size: tuple[int, int], planes: int) -> None:
    inputs = [hard_rows(*size), floats(size[1], seed=2)]
    normed = run(("norm", size), inputs, size)
    expected = run_quantised(("quantise", size, planes), [normed], size, planes)
    assert all_same(run_quantised(("norm_quantise", size, planes), inputs, size, planes), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("planes", PLANES)
def test_add_norm_quantise_also_returns_the_sum(size: tuple[int, int], planes: int) -> None:
    a, b, gain = hard_rows(*size), floats(*size, seed=3), floats(size[1], seed=2)
    total = run(("add", size), [a, b], size)
    normed = run(("norm", size), [total, gain], size)
    expected = run_quantised(("quantise", size, planes), [normed], size, planes)
    empty = np.full(size, 99, np.float32)
    found = run_quantised(("add_norm_quantise", size, planes), [a, b, gain, empty], size, planes)
    assert all_same(found, expected)
    written = call(
        kernels(size)["add_norm_quantise", size, planes], a, b, gain, empty, *(np.zeros_like(part) for part in found)
    )[3]
    assert same_bits(written, total)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("planes", PLANES)
def test_gated_quantise_is_the_gate_then_quantise(name: str, size: tuple[int, int], planes: int) -> None:
    rows, columns = size
    gate_up = np.concatenate([40 * floats(rows, columns, seed=4), hard_rows(rows, columns)], axis=1)
    gated = run((name, size), [gate_up], size)
    expected = run_quantised(("quantise", size, planes), [gated], size, planes)
    assert all_same(run_quantised((f"{name}_quantise", size, planes), [gate_up], size, planes), expected)


@pytest.mark.parametrize("kind", ["norm", "silu", "gelu"])
def test_a_nan_shows_in_the_scale_of_its_row_alone(kind: str) -> None:
    rows, columns = size = (3, 77)
    x: NDArray[np.float32] = floats(rows, 2 * columns if kind != "norm" else columns)
    x[1, 76] = np.nan
    inputs = [x, floats(columns)] if kind == "norm" else [x]
    row_scale = run_quantised((f"{kind}_quantise", size, 2), inputs, size, 2)[1]
    assert np.isfinite(row_scale).tolist() == [True, False, True]
