"""Each AMX instruction against numpy, on AMX or on the emulator, and what the emulator refuses as AMX would."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.amx_machine import CAN_RUN, NATIVE, address_of, amx, configuration, stored_configuration

Array = NDArray[np.uint8]
Sums = NDArray[np.int32]

pytestmark = pytest.mark.skipif(not CAN_RUN, reason="this machine's processor has no avx512_vnni")
on_emulator = pytest.mark.skipif(NATIVE, reason="a processor answers with a signal, not a sentence")

MARGIN = ((0, 0), (0, 7))  # what follows a row in memory


def random_bytes(*shape: int, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    values.flat[:3] = 0, 128, 255
    return values


def multiply(instruction: str, sums: Sums, a: Array, b: Array) -> Sums:
    """Return what a product instruction makes of tiles; rows in memory are longer than those of the tiles."""
    rows, outputs, lanes = len(a), sums.shape[1], len(b)
    config = configuration({0: (rows, 4 * outputs), 6: (rows, 4 * lanes), 7: (lanes, 4 * outputs)})
    wide_a, wide_b, wide_sums = np.pad(a, MARGIN), np.pad(b, MARGIN), np.pad(sums, MARGIN)
    pointers = [address_of(array) for array in (config, wide_a, wide_b, wide_sums)]
    getattr(amx(), f"amx_{instruction}")(*pointers, *(part.strides[0] for part in (wide_a, wide_b, wide_sums)))
    result: Sums = wide_sums[:, :outputs]
    return result


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 16), outputs=st.integers(1, 16), lanes=st.integers(1, 16))
@pytest.mark.parametrize(
    ("instruction", "left", "right"),
    [
        ("tdpbssd", np.int8, np.int8),
        ("tdpbsud", np.int8, np.uint8),
        ("tdpbusd", np.uint8, np.int8),
        ("tdpbuud", np.uint8, np.uint8),
    ],
)
def test_products_add_integers_of_their_signs_modulo_2_to_32(
    instruction: str, left: type, right: type, rows: int, outputs: int, lanes: int
) -> None:
    a, b = random_bytes(rows, 4 * lanes), random_bytes(lanes, 4 * outputs, seed=1)
    sums = np.full((rows, outputs), 2**31 - 1, np.int32)
    left_values: NDArray[np.int64] = a.view(left).astype(np.int64)
    right_values: NDArray[np.int64] = b.view(right).astype(np.int64)
    by_input = right_values.reshape(lanes, outputs, 4).transpose(0, 2, 1).reshape(4 * lanes, outputs)
    expected = sums.astype(np.int64) + left_values @ by_input
    np.testing.assert_array_equal(multiply(instruction, sums, a, b), expected.astype(np.int32))


def test_rows_are_loaded_and_stored_at_their_stride() -> None:
    source, target = random_bytes(16, 128), np.zeros((16, 128), np.uint8)
    config = configuration({3: (5, 24)})
    amx().amx_configure(address_of(config))
    amx().amx_copy(address_of(source), address_of(target), 32)
    amx().amx_release()
    expected = np.zeros_like(source)
    expected[:5, :24] = source[:5, :24]
    np.testing.assert_array_equal(target, expected)


def test_a_zeroed_tile_stores_zeros_in_its_shape_alone() -> None:
    target = random_bytes(16, 64)
    expected = target.copy()
    expected[:3, :8] = 0
    config = configuration({5: (3, 8)})
    amx().amx_configure(address_of(config))
    amx().amx_zeros(address_of(target), 64)
    amx().amx_release()
    np.testing.assert_array_equal(target, expected)


def test_the_configuration_is_stored_as_it_was_loaded_until_it_is_released() -> None:
    config = configuration({0: (16, 64), 7: (1, 4)})
    amx().amx_configure(address_of(config))
    held = stored_configuration()
    amx().amx_release()
    np.testing.assert_array_equal(held, config)
    np.testing.assert_array_equal(stored_configuration(), np.zeros(64, np.uint8))


TRIAL = """
import numpy as np
from tests.amx_machine import address_of, amx, configuration
data = np.zeros((16, 64), np.uint8)
def configure(shapes, palette=1):
    amx().amx_configure(address_of(configuration(shapes, palette)))
"""


@on_emulator
@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        ("amx().amx_zeros(address_of(data), 64)", "tilezero: tiles are not configured"),
        pytest.param(
            "configure({1: (16, 64)}); amx().amx_zeros(address_of(data), 64)",
            "tilezero: tile 5 is not configured",
            marks=pytest.mark.exhaustive,
        ),
        ("configure({}, palette=2)", "ldtilecfg: palette 2, there are 0 and 1"),
        ("configure({2: (17, 64)})", "ldtilecfg: tile 2 has 17 rows of 64 bytes, at most 16 of 64"),
        pytest.param(
            "configure({2: (16, 65)})",
            "ldtilecfg: tile 2 has 16 rows of 65 bytes, at most 16 of 64",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "configure({2: (0, 64)})",
            "ldtilecfg: tile 2 has 0 rows of 64 bytes, at most 16 of 64",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param("configure({8: (16, 0)})", "ldtilecfg: byte 56 is 16, must be 0", marks=pytest.mark.exhaustive),
        pytest.param(
            "configure({0: (2, 4), 1: (2, 4)}); amx().amx_repeated_operand()",
            "tdpb: tiles 0, 1 and 1 are not distinct",
            marks=pytest.mark.exhaustive,
        ),
        (
            "config = configuration({0: (2, 8), 6: (2, 12), 7: (2, 8)})\n"
            "amx().amx_tdpbssd(*map(address_of, (config, data, data, data)), 64, 64, 64)",
            "tdpb: sums of 2 x 8 bytes are not the product of 2 x 12 and 2 x 8",
        ),
    ],
)
def test_what_hardware_would_refuse_ends_the_process_with_a_sentence(trial: str, expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", TRIAL + trial], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (-6, expected)


@on_emulator
def test_other_illegal_instructions_stay_illegal() -> None:
    trial = "amx().amx_other_illegal_instruction()"
    assert subprocess.run([sys.executable, "-c", TRIAL + trial], check=False).returncode == -4
