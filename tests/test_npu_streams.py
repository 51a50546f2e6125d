"""Command streams that are damaged, of another device, or would not run to their end are refused in a sentence."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.test_npu_device import DOTS, ONE_TILE, SMALL, packed, random_weight

from engram_compilers.npu.device import compiler_for
from engram_runtime.errors import TargetError
from engram_runtime.npu import isa
from engram_runtime.npu.device import Geometry, Product
from engram_runtime.npu.devices import open_device, parse_geometry

PRODUCT = Product(rows=2, inputs=40, outputs=12, weights="int8")
AGAIN = "; compile the bundle again"
STREAMS = {geometry.accelerator: compiler_for(geometry).commands(PRODUCT) for geometry in (SMALL, DOTS)}
LOAD = isa.HEADER.itemsize  # where the first command stands: a LOAD_WEIGHT
MULTIPLY = LOAD + 16 * 4  # after two weights and two strips of inputs


def message(geometry: Geometry, commands: bytes) -> str:
    with pytest.raises(TargetError) as caught:
        open_device(geometry).load(commands)
    return str(caught.value)


def changed(**fields: int) -> bytes:
    """Return the systolic stream with fields of its header changed."""
    header = np.frombuffer(STREAMS["systolic"], isa.HEADER, count=1).copy()
    for name, value in fields.items():
        header[name] = value
    damaged: bytes = header.tobytes()
    return damaged + STREAMS["systolic"][LOAD:]


def recommanded(edit: Callable[[Any], Any]) -> bytes:
    """Return the systolic stream with its commands edited, and as many in its header."""
    commands = edit(np.frombuffer(STREAMS["systolic"], isa.COMMAND, offset=LOAD).copy())
    edited: bytes = commands.tobytes()
    return changed(commands=len(commands))[:LOAD] + edited


def field(index: int, name: str, value: int) -> bytes:
    def edit(commands: Any) -> Any:
        commands[name][index] = value
        return commands

    return recommanded(edit)


def without(index: int) -> bytes:
    return recommanded(lambda commands: np.delete(commands, index))


def twice(index: int) -> bytes:
    return recommanded(lambda commands: np.insert(commands, index, commands[index]))


OPCODES = [command[0] for command in np.frombuffer(STREAMS["systolic"], isa.COMMAND, offset=LOAD).tolist()]


def test_the_stream_that_is_damaged_here_begins_as_the_cases_say() -> None:
    assert OPCODES == [1, 1, 2, 2, 3, 1, 3, 4, 1, 3, 3, 4]


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (b"", f"0 bytes are no command stream of a systolic array{AGAIN}"),
        (STREAMS["dot-engine"], f"{len(STREAMS['dot-engine'])} bytes are no command stream of a systolic array{AGAIN}"),
        (changed(version=2), f"a command stream has version 2, this runtime reads 1{AGAIN}"),
        (changed(version=1)[:-1], f"a command stream has 239 bytes, its header says 240{AGAIN}"),
        (
            changed(commands=2**32 - 1),
            f"a command stream has 240 bytes, its header says {16 * (2**32 - 1) + 48}{AGAIN}",
        ),
        (
            changed(weight_bits=5),
            f"a command stream has weights of 5 bits, routed 0 and a last field 0, wanted [4, 8], 0 or 1, and 0{AGAIN}",
        ),
        (changed(inputs=0), "a product has 0 inputs, devices take 1 to 131071"),
        (changed(rows=2**32 - 1), f"a product has {2**32 - 1} rows, devices take 1 to 65536"),
        (changed(weight_bits=4), "a product of int4 weights has 40 inputs, wanted a multiple of 32"),
        (
            changed(row_block=0),
            f"a command stream holds 0 rows at a time, wanted 1 to 2 and scratchpads of two slots each{AGAIN}",
        ),
        (
            changed(row_block=3),
            f"a command stream holds 3 rows at a time, wanted 1 to 2 and scratchpads of two slots each{AGAIN}",
        ),
        (field(0, "opcode", 9), f"command 0 of a stream has opcode 9, wanted one of [1, 2, 3, 4]{AGAIN}"),
        (field(0, "weight", 2), f"command 0 of a stream has weight 2, wanted less than 2, or 0{AGAIN}"),
        (field(0, "sums", 1), f"command 0 of a stream has sums 1, wanted less than 4, or 0{AGAIN}"),
        (field(1, "input_tile", 2), f"command 1 of a stream has input_tile 2, wanted less than 2, or 0{AGAIN}"),
        (field(4, "flags", 8), f"command 4 of a stream has flags 8, wanted less than 8, or 0{AGAIN}"),
        (field(1, "weight", 0), f"command 1 of a stream loads weight slot 0, which is in use{AGAIN}"),
        (twice(2), f"command 3 of a stream loads input slot 0, which is in use{AGAIN}"),
        (without(0), f"command 3 of a stream multiplies weight slot 0, which doesn't hold its tile{AGAIN}"),
        (without(2), f"command 3 of a stream multiplies input slot 0, which doesn't hold its inputs{AGAIN}"),
        (
            field(4, "flags", 3),
            f"command 4 of a stream adds to sum slot 0, which doesn't hold the sums before it{AGAIN}",
        ),
        (without(6), f"command 6 of a stream stores sum slot 0, which doesn't hold whole sums{AGAIN}"),
        (without(11), f"a command stream stores 1 of 2 tiles of sums and leaves 1 slots in use{AGAIN}"),
        (
            recommanded(lambda commands: commands[:0]),
            f"a command stream stores 0 of 2 tiles of sums and leaves 0 slots in use{AGAIN}",
        ),
    ],
)
def test_a_stream_that_is_damaged_is_refused(commands: bytes, expected: str) -> None:
    assert message(SMALL, commands) == expected


def test_sums_begin_with_the_first_inputs() -> None:
    def edit(commands: Any) -> Any:
        commands["flags"][6], commands["sums"][6] = isa.FREE_WEIGHT, 1
        return commands

    expected = f"command 6 of a stream adds to sum slot 1, which doesn't hold the sums before it{AGAIN}"
    assert message(SMALL, recommanded(edit)) == expected


def test_a_tile_of_sums_is_stored_once() -> None:
    expected = f"command 19 of a stream stores sums that were stored before{AGAIN}"
    assert message(SMALL, recommanded(lambda commands: np.concatenate([commands, commands]))) == expected


def test_a_stream_of_another_geometry_is_refused() -> None:
    other = replace(SMALL, dma_latency_cycles=11)
    assert message(other, STREAMS["systolic"]) == (
        "a command stream is for a systolic array of 32 x 8 with its own memories, this one is SystolicArray(rows=32, "
        "columns=8, weight_bytes=512, input_bytes=128, accumulator_bytes=256, dma_bytes_per_cycle=4, "
        f"dma_latency_cycles=11, clock_hz=1000000){AGAIN}"
    )


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (STREAMS["systolic"], f"240 bytes are no command stream of a dot engine{AGAIN}"),
        (STREAMS["dot-engine"][:-1], f"a command stream of a dot engine has 91 bytes, wanted 92{AGAIN}"),
        (
            STREAMS["dot-engine"][:-4] + bytes(4),
            f"a command stream of a dot engine does not compute its product{AGAIN}",
        ),
    ],
)
def test_a_dot_engine_refuses_streams_that_are_damaged(commands: bytes, expected: str) -> None:
    assert message(DOTS, commands) == expected


def test_a_dot_engine_refuses_streams_of_another_and_products_too_large() -> None:
    assert message(replace(DOTS, registers=3), STREAMS["dot-engine"]) == (
        "a command stream is for another dot engine than DotEngine(lanes=3, width=5, registers=3, input_bytes=100, "
        f"dma_bytes_per_cycle=4, clock_hz=1000000){AGAIN}"
    )
    with pytest.raises(
        TargetError, match=r"^a product has 101 inputs, the dot engine holds 100; give it more input_bytes$"
    ):
        compiler_for(DOTS).commands(replace(PRODUCT, inputs=101))


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([SMALL, DOTS]), st.lists(st.tuples(st.integers(0, 239), st.integers(0, 255)), min_size=1), st.data()
)
def test_a_mutated_stream_is_refused_or_computes_a_product(
    geometry: Geometry, edits: list[tuple[int, int]], data: st.DataObject
) -> None:
    commands = bytearray(STREAMS[geometry.accelerator])
    for place, value in edits[: data.draw(st.integers(1, 4))]:
        commands[place % len(commands)] = value
    try:
        program = open_device(geometry).load(bytes(commands))
    except TargetError:
        return
    product = program.product
    assume(product.weight_bytes < 10**6)
    weight, parts = random_weight(product, 0)
    planes = np.random.default_rng(1).integers(-128, 128, (product.rows, product.inputs)).astype(np.int8)
    sums, _ = program.run(packed(geometry, product, parts), planes)
    np.testing.assert_array_equal(sums, planes.astype(np.int32) @ weight.T)


@pytest.mark.parametrize(
    ("accelerator", "table", "expected"),
    [
        ("tpu", {}, "library x is for accelerator 'tpu', there are ['systolic', 'dot-engine']"),
        ("systolic", [], "library x.npu is [], expected an object"),
        ("dot-engine", {"lanes": 1}, "library x.npu has no key 'width'"),
        ("dot-engine", {"lanes": 0}, "library x.npu has no key 'width'"),
    ],
)
def test_a_library_for_no_accelerator_is_refused(accelerator: str, table: object, expected: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_geometry(accelerator, table, "library x")
    assert str(caught.value) == expected


def test_a_product_that_is_none_is_refused() -> None:
    with pytest.raises(TargetError, match=r"^a product has weights 'int2', devices take \['int8', 'int4'\]$"):
        replace(ONE_TILE, weights="int2")
