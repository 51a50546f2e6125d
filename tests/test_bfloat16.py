"""Float weights that are all bfloat16 take half the bytes and give the same bits."""

from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
import pytest
from tests.test_kernels import Array, call, compile_kernels, floats, same_bits
from tests.tiny import TinyModel
from tests.workshop import Workshop, bundle_logits, random_ids, stepwise_logits

from engram_compilers.kernels import float_linear
from engram_compilers.kernels.float_linear import BFLOAT16, FLOAT32
from engram_runtime.library import find_library

ROWS, OUTPUTS, INPUTS, VOCABULARY = [1, 2, 7, 8, 16, 17], [9, 64, 201], 70, 90
PAIRED = [(1, 9), (2, 201), (7, 64), (8, 9), (16, 64), (17, 201)]
EVERY_PAIR = [
    pytest.param(*pair, marks=[] if pair in PAIRED else [pytest.mark.exhaustive]) for pair in product(ROWS, OUTPUTS)
]


def truncated(weight: Array) -> Array:
    """Cut float32 down to bfloat16."""
    halves: Array = (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return halves


@cache
def embedding(dtype: str) -> Callable[..., None]:
    return compile_kernels({0: float_linear.embed_float(5, VOCABULARY, INPUTS, dtype)})[0]


@cache
def layer(rows: int, outputs: int, dtype: str) -> Callable[..., None]:
    return compile_kernels({0: float_linear.linear_float(rows, outputs, INPUTS, dtype)})[0]


def linear(x: Array, weight: Array, dtype: str) -> Array:
    packed = float_linear.pack_float(weight, dtype)["weight"]
    assert packed.dtype == dtype
    rows, outputs = len(x), len(weight)
    return call(layer(rows, outputs, dtype), x, packed, np.full((rows, outputs), 9, np.float32))[-1]


@pytest.mark.parametrize(("rows", "outputs"), EVERY_PAIR)
def test_bfloat16_weights_give_the_bits_of_float32_ones(rows: int, outputs: int) -> None:
    x, weight = floats(rows, INPUTS), truncated(floats(outputs, INPUTS, seed=1))
    found = linear(x, weight, BFLOAT16)
    assert same_bits(found, linear(x, weight, FLOAT32))
    # Rounded once for each of 70 products.
    bound = INPUTS * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weight).T)
    assert np.all(np.abs(found - x.astype(np.float64) @ weight.astype(np.float64).T) <= bound)


@pytest.mark.parametrize("rows", ROWS[1:])
def test_a_row_does_not_depend_on_its_neighbours(rows: int) -> None:
    x, weight = floats(rows, INPUTS), floats(64, INPUTS, seed=1)
    alone = [linear(x[row : row + 1], weight, FLOAT32) for row in range(rows)]
    assert same_bits(linear(x, weight, FLOAT32), np.concatenate(alone))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_embedding_reads_the_packed_weight_of_the_output_layer(dtype: str) -> None:
    weight, ids = truncated(floats(VOCABULARY, INPUTS)), np.array([0, 15, 16, 88, 89])
    packed = float_linear.pack_float(weight, dtype)["weight"]
    assert same_bits(call(embedding(dtype), ids, packed, np.zeros((5, INPUTS), np.float32))[-1], weight[ids])


def test_one_weight_that_is_no_bfloat16_keeps_float32() -> None:
    weight = truncated(floats(4, 6))
    assert float_linear.float_dtype(weight) == BFLOAT16
    weight[3, 5] = np.nextafter(weight[3, 5], np.float32(9))
    assert float_linear.float_dtype(weight) == FLOAT32


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_bfloat16_checkpoint_has_half_the_weights_and_the_same_logits(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(dtype="bfloat16", tied=tied)))
    half = workshop.compiled(bundle)
    monkeypatch.setattr("engram_compilers.kernel_converters.float_dtype", lambda weight: FLOAT32)
    whole = workshop.compiled(bundle, prefill_tokens=(16,))
    found, expected = (bundle_logits(compiled, random_ids(30), "tvm") for compiled in (half, whole))
    assert same_bits(found, expected)
    assert same_bits(found, stepwise_logits(half, random_ids(30), "tvm"))
    sizes = {name: find_library(compiled)[1].weights_bytes for name, compiled in (("half", half), ("whole", whole))}
    assert sizes["half"] < 0.6 * sizes["whole"]  # rotary tables and gains stay float32
