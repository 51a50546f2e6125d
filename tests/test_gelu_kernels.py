"""Element-wise functions, gates and products per token against numpy, however many are computed at once."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.test_kernels import Array, call, compile_kernels, floats, same_bits

from engram_compilers.kernels import activation, batched_matmul, streams

FUNCTIONS = {
    "gelu": activation.gelu,
    "sigmoid": activation.sigmoid,
    "silu": activation.silu,
    "tanh": activation.tanh,
}
SIZES = (1, 16, 77, 4096)
COLUMNS = (9, 77, 576)
PRODUCTS = ((1, 4, 4, 77), (17, 4, 4, 77), (17, 3, 3, 64), (1, 3, 3, 64), (17, 2, 5, 8), (1, 2, 5, 8))


@cache
def kernels() -> dict[Any, Callable[..., None]]:
    made: dict[Any, Any] = {
        (name, size): activation.each(size, function) for name, function in FUNCTIONS.items() for size in SIZES
    }
    gated = {("gelu_mul", *size): activation.gated(*size, activation.gelu) for size in product((1, 17), COLUMNS)}
    made |= gated
    made |= {("gate_value", rows): streams.gate_value(rows, 2, 21) for rows in (1, 3)}
    made |= {sizes: batched_matmul.batched_matmul(*sizes) for sizes in PRODUCTS}
    return compile_kernels(made)


def each(name: str, x: Array) -> Array:
    return call(kernels()[name, len(x)], x, np.zeros_like(x))[-1]


def gelu_mul(gate_up: Array) -> Array:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    return call(kernels()["gelu_mul", rows, columns], gate_up, np.zeros((rows, columns), np.float32))[-1]


def products(a: Array, b: Array) -> Array:
    sizes = (*a.shape, b.shape[2])
    return call(kernels()[sizes], a, b, np.zeros((a.shape[0], a.shape[1], b.shape[2]), np.float32))[-1]


def exact_gelu(x: Array) -> Array:
    wide = x.astype(np.float64)
    slope = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    with np.errstate(over="ignore"):
        exact: Array = wide / (1 + np.exp(-2 * slope))  # 1 + tanh(x), without what it loses far below 0
    return exact


# exp takes arguments down to -87 that were rounded a few times; below it is 0, which drops results under 1e-33.
TAIL = 300 * 2.0**-24
ANY_FLOATS = arrays(np.float32, 77, elements=st.floats(-1e4, 1e4, width=32))


@settings(deadline=None)
@given(ANY_FLOATS)
def test_gelu_is_that_of_tanh(x: Array) -> None:
    np.testing.assert_allclose(each("gelu", x), exact_gelu(x), rtol=TAIL, atol=1e-33)


@settings(deadline=None)
@given(ANY_FLOATS)
def test_tanh_is_good_to_one_in_ten_million(x: Array) -> None:
    np.testing.assert_allclose(each("tanh", x), np.tanh(x.astype(np.float64)), atol=2.0**-23)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_infinities_and_nan_are_what_they_should_be(name: str) -> None:
    x = np.resize(np.array([np.inf, np.nan, -3e38, 3e38, 0.0], np.float32), 16)
    found = each(name, x)[:5]
    limits = {
        "gelu": [np.inf, np.nan, 0.0, 3e38, 0.0],
        "sigmoid": [1.0, np.nan, 0.0, 1.0, 0.5],
        "silu": [np.inf, np.nan, 0.0, 3e38, 0.0],
        "tanh": [1.0, np.nan, -1.0, 1.0, 0.0],
    }[name]
    np.testing.assert_array_equal(found, np.array(limits, np.float32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_value_does_not_depend_on_its_place(name: str) -> None:
    x = floats(77) * 4
    alone = [each(name, x[place : place + 1]) for place in range(77)]
    assert same_bits(each(name, x), np.concatenate(alone))


@pytest.mark.parametrize("columns", COLUMNS)
def test_gelu_mul_is_gelu_of_the_gate_times_up(columns: int) -> None:
    gate_up = floats(17, 2 * columns) * 4
    gate, up = np.split(gate_up, 2, axis=1)
    np.testing.assert_allclose(gelu_mul(gate_up), exact_gelu(gate) * up, rtol=TAIL, atol=1e-33)
    alone = [gelu_mul(gate_up[row : row + 1]) for row in range(17)]
    assert same_bits(gelu_mul(gate_up), np.concatenate(alone))


def gate_value(key: Array, query: Array, value: Array) -> Array:
    return call(kernels()["gate_value", len(key)], key, query, value, np.zeros_like(key))[-1]


def gate_inputs() -> tuple[Array, Array, Array]:
    """Return key and query ``[3, 2 * 21]``, the last scores of which are 0, and value ``[3, 21]``."""
    key, query, value = floats(3, 42), floats(3, 42, seed=1), floats(3, 21, seed=2)
    key[2] = 0.0
    return key, query, value


def test_a_gate_is_the_sigmoid_of_the_signed_root_of_its_score() -> None:
    key, query, value = gate_inputs()
    score = (key.astype(np.float64) * query).reshape(3, 2, 21).sum(axis=2, keepdims=True) / np.sqrt(21)
    gate = 1 / (1 + np.exp(-np.sign(score) * np.sqrt(np.maximum(np.abs(score), streams.GATE_FLOOR))))
    found = gate_value(key, query, value)
    np.testing.assert_allclose(found, (gate * value[:, None]).reshape(3, 42), rtol=1e-5)
    alone = [gate_value(key[row : row + 1], query[row : row + 1], value[row : row + 1]) for row in range(3)]
    assert same_bits(found, np.concatenate(alone))


def test_a_gate_whose_score_is_no_number_shows_it() -> None:
    key, query, value = gate_inputs()
    key[1, 30] = np.nan
    found = np.isnan(gate_value(key, query, value)).reshape(3, 2, 21)
    assert np.argwhere(found.all(axis=2)).tolist() == [[1, 1]]
    assert found.sum() == 21


@pytest.mark.parametrize("sizes", [sizes for sizes in PRODUCTS if sizes[0] > 1])
def test_a_product_per_token_is_that_of_numpy(sizes: tuple[int, int, int, int]) -> None:
    batch, rows, inner, columns = sizes
    a, b = floats(batch, rows, inner), floats(batch, inner, columns, seed=1)
    found = products(a, b)
    bound = np.abs(a).astype(np.float64) @ np.abs(b) * inner * 2.0**-24
    assert (np.abs(found - a.astype(np.float64) @ b) <= bound).all()
    alone = [products(a[token : token + 1], b[token : token + 1]) for token in range(batch)]
    assert same_bits(found, np.concatenate(alone))
