"""The systolic array: sums equal numpy's, whatever the engines' order, and bytes and cycles are what formulas say."""

import random
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_compilers.npu.device import COMPILERS, compiler_for
from engram_compilers.npu.schedule import schedule
from engram_compilers.npu.tiling import choose_tiling
from engram_runtime.npu import isa
from engram_runtime.npu.device import GROUP, Cost, Geometry, Product, Program
from engram_runtime.npu.devices import ACCELERATORS, open_device
from engram_runtime.npu.dot_engine import DotEngine
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.simulator import Simulator
from engram_runtime.npu.steps import steps_of
from engram_runtime.npu.timing import Clocks, moved_cost
from engram_targets import NpuProfile, load_profile

SMALL = SystolicArray(
    rows=32,
    columns=8,
    weight_bytes=512,
    input_bytes=128,
    accumulator_bytes=256,
    dma_bytes_per_cycle=4,
    dma_latency_cycles=10,
    clock_hz=10**6,
)
DOTS = DotEngine(lanes=3, width=5, registers=2, input_bytes=100, dma_bytes_per_cycle=4, clock_hz=10**6)
DEMO = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]  # outputs and inputs of SmolLM2-135M's layers


def array_of(name: str) -> SystolicArray:
    profile = load_profile(name)
    assert isinstance(profile, NpuProfile)
    assert isinstance(profile.geometry, SystolicArray)
    return profile.geometry


ARRAYS = {name: array_of(name) for name in ("npu-systolic", "npu-systolic-small")}
WIDEST = {"npu-systolic": 128, "npu-systolic-small": 32}  # rows of the widest pass, two planes a token


def random_weight(product: Product, seed: int) -> tuple[NDArray[np.int32], list[NDArray[np.uint8]]]:
    """Return a weight ``[N, K]`` and what its packer takes."""
    rng = np.random.default_rng(seed)
    shape, groups = (product.outputs, product.inputs), (product.outputs, product.inputs // GROUP)
    if product.weights == "int8":
        stored = rng.integers(0, 256, shape).astype(np.uint8)
        return stored.astype(np.int32) - 128, [stored]
    multiplier = rng.integers(1, 9, groups).astype(np.uint8)
    codes, zero = rng.integers(0, 16, shape).astype(np.uint8), rng.integers(0, 16, groups).astype(np.uint8)
    values = codes.astype(np.int32) - np.repeat(zero, GROUP, axis=1)
    return values * np.repeat(multiplier, GROUP, axis=1), [codes, multiplier, zero]


def packed(geometry: Geometry, product: Product, parts: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    compiler = compiler_for(geometry)
    return compiler.pack_int8(*parts) if product.weights == "int8" else compiler.pack_int4(*parts)


def random_planes(rows: int, product: Product, seed: int) -> NDArray[np.int8]:
    """Return planes with columns past the inputs, which are no zeros."""
    return np.random.default_rng(seed).integers(-128, 128, (rows, product.inputs + 3)).astype(np.int8)


@st.composite
def arrays(draw: st.DrawFn) -> SystolicArray:
    rows, columns, beat = draw(st.sampled_from([32, 64])), 4 * draw(st.integers(1, 6)), draw(st.sampled_from([1, 4, 8]))
    beats = {
        "weight_bytes": 2 * rows * columns + beat * draw(st.integers(0, 500)),
        "input_bytes": 2 * rows + beat * draw(st.integers(0, 100)),
        "accumulator_bytes": 8 * columns + beat * draw(st.integers(0, 200)),
    }
    array = SystolicArray(
        rows=rows,
        columns=columns,
        dma_bytes_per_cycle=beat,
        dma_latency_cycles=draw(st.integers(0, 50)),
        clock_hz=1,
        **beats,
    )
    array.check("drawn")
    return array


@st.composite
def products(draw: st.DrawFn) -> Product:
    weights = draw(st.sampled_from(["int8", "int4"]))
    inputs = GROUP * draw(st.integers(1, 6)) if weights == "int4" else draw(st.integers(1, 200))
    rows, outputs = draw(st.integers(1, 20)), draw(st.integers(1, 60))
    return Product(rows=rows, inputs=inputs, outputs=outputs, weights=weights, routed=draw(st.booleans()))


DOT_ENGINES = st.builds(
    DotEngine,
    lanes=st.integers(1, 20),
    width=st.integers(1, 9),
    registers=st.integers(1, 9),
    input_bytes=st.integers(200, 1000),
    dma_bytes_per_cycle=st.integers(1, 9),
    clock_hz=st.just(1),
)


@settings(deadline=None)
@given(arrays() | DOT_ENGINES, products(), st.data())
def test_sums_are_those_of_numpy(geometry: Geometry, product: Product, data: st.DataObject) -> None:
    rows, seed = data.draw(st.integers(1, product.rows)), data.draw(st.integers(0, 2**32))
    weight, parts = random_weight(product, seed)
    memory, planes = packed(geometry, product, parts), random_planes(rows, product, seed)
    program = open_device(geometry).load(compiler_for(geometry).commands(product))
    sums, cost = program.run(np.concatenate([memory, memory[:5]]), planes)
    np.testing.assert_array_equal(sums, planes[:, : product.inputs].astype(np.int32) @ weight.T, strict=True)
    assert (program.product, program.weight_bytes) == (product, memory.size)
    assert cost.dma_bytes >= product.compulsory_bytes(rows)


@settings(deadline=None)
@given(arrays(), products())
def test_a_run_moves_and_multiplies_what_its_tiling_says(geometry: SystolicArray, product: Product) -> None:
    tiling = choose_tiling(geometry, product)
    stream = schedule(tiling)
    cost = moved_cost(geometry, stream, steps_of(geometry, stream, product.rows))
    assert cost.weight_bytes + cost.input_bytes + cost.output_bytes == tiling.dma_bytes
    assert cost.macs == product.macs(product.rows)
    assert cost.command_bytes == len(compiler_for(geometry).commands(product))


def test_the_largest_sums_of_the_largest_tile_are_exact() -> None:
    geometry = replace(SMALL, rows=1024, columns=4, weight_bytes=8192, input_bytes=4096)
    product = Product(rows=2, inputs=3000, outputs=5, weights="int8")
    memory = compiler_for(geometry).pack_int8(np.zeros((5, 3000), np.uint8))  # -128 each
    planes = np.full((2, 3000), -128, np.int8)
    planes[:, ::7] = -127
    sums, _ = open_device(geometry).load(compiler_for(geometry).commands(product)).run(memory, planes)
    assert sums.tolist() == [[-128 * int(planes[0].sum(dtype=np.int32))] * 5] * 2


def seen_by_engines(stream: isa.Stream, choose: random.Random) -> list[tuple[Any, ...]]:
    """Run the engines in any order their full bits allow; tell what each MULTIPLY and STORE finds in its slots."""
    queues: dict[str, deque[tuple[int, ...]]] = {name: deque() for name in ("load", "array", "store")}
    for command in stream.commands.tolist():
        queues[{isa.MULTIPLY: "array", isa.STORE: "store"}.get(command[0], "load")].append(command)
    weights: dict[int, Any] = {}
    inputs: dict[int, Any] = {}
    sums: dict[int, Any] = {}
    whole: set[int] = set()  # slots of sums that the array is done with
    seen: list[tuple[Any, ...]] = []
    last = -(-stream.product.inputs // SMALL.rows) - 1

    def ready(opcode: int, flags: int, weight: int, held: int, slot: int, *_: int) -> bool:
        if opcode == isa.MULTIPLY:
            return weight in weights and held in inputs and (flags & isa.ACCUMULATE or slot not in sums) > 0
        return {isa.LOAD_WEIGHT: weight not in weights, isa.LOAD_INPUT: held not in inputs}.get(opcode, slot in whole)

    def run(opcode: int, flags: int, weight: int, held: int, slot: int, *tile: int) -> None:
        if opcode == isa.LOAD_WEIGHT:
            weights[weight] = tile
        elif opcode == isa.LOAD_INPUT:
            inputs[held] = tile[:2]
        elif opcode == isa.MULTIPLY:
            seen.append((opcode, tile, weights[weight], inputs[held], sums.get(slot)))
            sums[slot] = tile
            whole.update({slot} if tile[1] == last else ())
            weights.pop(weight) if flags & isa.FREE_WEIGHT else None
            inputs.pop(held) if flags & isa.FREE_INPUT else None
        else:
            whole.remove(slot)
            seen.append((opcode, tile, sums.pop(slot)))

    while any(queues.values()):
        run(*choose.choice([queue for queue in queues.values() if queue and ready(*queue[0])]).popleft())
    return sorted(seen, key=repr)


@settings(deadline=None)
@given(products(), st.integers(0, 2**32))
def test_slots_hold_the_same_whatever_the_engines_speeds(product: Product, seed: int) -> None:
    stream = schedule(choose_tiling(SMALL, product))
    for found in seen_by_engines(stream, random.Random(seed)):
        block, input_tile, output_tile = found[1]
        if found[0] == isa.MULTIPLY:
            before = (block, input_tile - 1, output_tile) if input_tile else None
            assert found[2:] == (found[1], (block, input_tile), before)
        else:
            assert found[2] == (block, -(-product.inputs // SMALL.rows) - 1, output_tile)


@pytest.mark.parametrize("name", ARRAYS)
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_dma_moves_little_more_than_it_must(name: str, data: st.DataObject) -> None:
    rows, outputs = data.draw(st.integers(1, WIDEST[name])), data.draw(st.integers(1, 70_000))
    weights, groups = data.draw(st.sampled_from(["int8", "int4"])), data.draw(st.integers(1, 256))
    product = Product(rows=rows, inputs=GROUP * groups, outputs=outputs, weights=weights)
    assert choose_tiling(ARRAYS[name], product).dma_bytes <= 1.2 * product.compulsory_bytes(rows)


@pytest.mark.parametrize("name", ARRAYS)
def test_inputs_that_do_not_fit_are_read_again_no_more_than_the_page_says(name: str) -> None:
    product = Product(rows=WIDEST[name], inputs=16384, outputs=65536, weights="int4")
    assert choose_tiling(ARRAYS[name], product).dma_bytes <= 1.255 * product.compulsory_bytes(WIDEST[name])


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ARRAYS)
def test_commands_included_the_demo_models_layers_move_little_more_than_they_must(name: str, weights: str) -> None:
    for rows in (2, WIDEST[name]):
        for outputs, inputs in DEMO[:4]:
            product = Product(rows=rows, inputs=inputs, outputs=outputs, weights=weights)
            stream = schedule(choose_tiling(ARRAYS[name], product))
            cost = moved_cost(ARRAYS[name], stream, steps_of(ARRAYS[name], stream, rows))
            assert cost.dma_bytes <= 1.1 * product.compulsory_bytes(rows)


def cycles_of_runs(product: Product, rows: int, count: int) -> list[int]:
    """Return the cycles of runs one after the other."""
    program = open_device(SMALL).load(compiler_for(SMALL).commands(product))
    return [program.run(*zeros_for(program, rows))[1].cycles for _ in range(count)]


def zeros_for(program: Program, rows: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Return a weight and planes of zeros."""
    return np.zeros(program.weight_bytes, np.uint8), np.zeros((rows, program.product.inputs), np.int8)


def ran(geometry: SystolicArray, product: Product) -> tuple[int, Clocks]:
    """Return the cycles of a first run, and the clocks after it."""
    device = Simulator(geometry)
    program = device.load(compiler_for(geometry).commands(product))
    _, cost = program.run(*zeros_for(program, product.rows))
    return cost.cycles, device.clocks


IN_TURN = [
    Product(rows=2, inputs=96, outputs=64, weights="int8"),
    Product(rows=2, inputs=576, outputs=576, weights="int4"),
    Product(rows=2, inputs=64, outputs=32, weights="int4", routed=True),
    Product(rows=2, inputs=100, outputs=700, weights="int8"),
]
ONE_TILE = Product(rows=2, inputs=32, outputs=8, weights="int8")
# The loads end at cycles (256 + 48 + 16) / 4 = 80 and 80 + (64 + 16) / 4 = 100, the weight is there at 90; it is in the
# cells 32 later, 2 rows are through at 124, their last sum 32 + 8 - 2 later; 64 bytes of sums are stored in 16.
FIRST = 90 + 32 + 2 + 38 + 16 + 10
# 66 cycles before the first run's end its weight was in the cells and the next one's could come: 80 + 10 later it is
# there. Of a routed product inputs come first: their load ends at (64 + 48 + 16) / 4 = 32, the weight's 68 later.
SECOND = 80 - 66 + 10 + 32 + 2 + 38 + 16 + 10
ROUTED = 32 + 68 + 10 + 32 + 2 + 38 + 16 + 10


def test_cycles_are_those_counted_by_hand() -> None:
    assert cycles_of_runs(ONE_TILE, 2, 3) == [FIRST, SECOND, SECOND]
    assert cycles_of_runs(replace(ONE_TILE, routed=True), 2, 2) == [ROUTED, ROUTED]
    assert cycles_of_runs(replace(ONE_TILE, rows=6), 2, 1) == [FIRST]


def test_inputs_are_loaded_as_their_slot_becomes_empty() -> None:
    """Three strips of 8 rows, two slots: the first has passed at 5 + 32 + 8, then the third is loaded.

    Each load takes 5 cycles. Tiles are in the cells at 37, 69 and 101; the last sum is there at 109 + 38, 4 more store.
    """
    wide = {"dma_bytes_per_cycle": 64, "dma_latency_cycles": 0, "input_bytes": 512, "accumulator_bytes": 512}
    cycles, clocks = ran(replace(SMALL, **wide), Product(rows=8, inputs=96, outputs=8, weights="int8"))
    assert (cycles, clocks) == (151, Clocks(45 + 5 - 151, (101 - 151, 69 - 151)))


def test_the_array_waits_for_sums_that_are_being_stored() -> None:
    """Stores of 640 single bytes take longest. The weight of tile 11 waits for that of tile 9 to leave its slot.

    That waits for tile 8 to begin, which begins the sums that tile 6 left, once the first seven are stored.
    """
    slow = {"dma_bytes_per_cycle": 1, "accumulator_bytes": 1280, "input_bytes": 1280}
    cycles, clocks = ran(replace(SMALL, **slow), Product(rows=20, inputs=32, outputs=96, weights="int8"))
    assert cycles > 12 * 640
    assert cycles + clocks.load > 7 * 640


@pytest.mark.parametrize("places", [(0, 1, 2, 3), (0, 2), (0,)])
def test_the_same_products_in_turn_leave_the_same_clocks_each_time(places: Sequence[int]) -> None:
    """What runs took is remembered by the clocks they began with: these must not drift."""
    device = Simulator(ARRAYS["npu-systolic-small"])
    programs = [device.load(compiler_for(device.geometry).commands(IN_TURN[place])) for place in places]
    rounds = []
    for _ in range(5):
        cycles = tuple(program.run(*zeros_for(program, rows=2))[1].cycles for program in programs)
        rounds.append((cycles, device.clocks))
    assert len(set(rounds[1:])) == 1
    assert sum(rounds[0][0]) > sum(rounds[1][0])


@settings(deadline=None)
@given(products(), st.integers(1, 4))
def test_no_engine_is_busier_than_there_are_cycles(product: Product, count: int) -> None:
    program = open_device(SMALL).load(compiler_for(SMALL).commands(product))
    total = sum((program.run(*zeros_for(program, product.rows))[1] for _ in range(count)), start=Cost())
    assert total.cycles > max(total.array_cycles, total.dma_in_cycles, total.dma_out_cycles)
    assert total.macs == count * product.macs(product.rows)


def test_int4_halves_the_bytes_of_weights() -> None:
    wide = {bits: Product(rows=2, inputs=64, outputs=64, weights=bits).weight_bytes for bits in ("int8", "int4")}
    assert wide == {"int8": 4096, "int4": 2048 + 128}


def test_the_program_on_the_page_on_devices_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path("docs/adding-a-device.md").read_text(encoding="utf-8")
    program, printed = re.findall(r"^```(?:python|text)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out == printed


def test_every_accelerator_has_a_compiler_and_a_simulator() -> None:
    assert list(COMPILERS) == list(ACCELERATORS)
    assert all(accelerator.geometry.accelerator == name for name, accelerator in ACCELERATORS.items())
