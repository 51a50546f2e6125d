"""Count the cycles of command streams: three engines that run side by side as far as full bits of slots allow.

With k, n the inputs and outputs of a tile, m the rows of a block, b the bytes moved:

- A load keeps its engine ceil((b + f) / dma_bytes_per_cycle) cycles, f being the bytes of the commands fetched since
  the load before it; what it loads is there dma_latency_cycles later. Requests follow one another without waiting.
- MULTIPLY first moves its weight tile into the cells' shadow registers, a row of the array a cycle: k cycles, while
  the tile before still multiplies. Then m rows stream through, one a cycle; then the weight's slot is long empty, the
  inputs' becomes so, and the last sum arrives k + n - 2 cycles later, while the next tile streams.
- A store keeps its engine ceil(b / dma_bytes_per_cycle) cycles, beside the loads; then its slot is empty, and the sums
  are in memory dma_latency_cycles later.
- Planes are there when the product before has ended: the host makes them of its sums, and its own time is not counted.
  Weights whose place is known (all but a routed product's) are loaded ahead, as slots become empty.
"""

from dataclasses import dataclass

import numpy as np

from engram_runtime.npu.device import Cost
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.isa import (
    ACCUMULATE,
    COMMAND,
    FREE_INPUT,
    FREE_WEIGHT,
    HEADER,
    LOAD_INPUT,
    LOAD_WEIGHT,
    MULTIPLY,
    STORE,
    Stream,
    slots,
)
from engram_runtime.npu.steps import Step, Steps


@dataclass(frozen=True, slots=True)
class Clocks:
    """When loads could go on, in cycles from the end of the last product (<= 0).

    Attributes:
        load: the load engine.
        weights: each weight slot, no sooner than the engine: so clocks after the same products are the same.
    """

    load: int
    weights: tuple[int, ...]


def at_rest(geometry: SystolicArray) -> Clocks:
    """Return the clocks of a device that has done nothing yet."""
    return Clocks(0, (0,) * slots(geometry, 1)["weight"])


class _Engines:
    """The engines' times while a stream runs, in cycles from when its planes are there."""

    def __init__(self, geometry: SystolicArray, stream: Stream, clocks: Clocks) -> None:
        held = slots(geometry, stream.row_block)
        self.geometry = geometry
        self.first_weight = 0 if stream.product.routed else clocks.load
        self.loader, self.weight_empty = clocks.load, list(clocks.weights)
        self.weight_full = [0] * held["weight"]
        self.input_empty, self.input_full = [0] * held["input"], [0] * held["input"]
        self.sums_empty, self.sums_full = [0] * held["sums"], [0] * held["sums"]
        self.shadow = self.array = self.storer = self.end = 0

    def moving(self, step: Step) -> int:
        """Return the cycles a load or a store keeps its engine."""
        return -(-(step.moved + step.fetched) // self.geometry.dma_bytes_per_cycle)

    def load_weight(self, step: Step) -> None:
        start = max(self.loader, self.weight_empty[step.weight], self.first_weight)
        self.loader = start + self.moving(step)
        self.weight_full[step.weight] = self.loader + self.geometry.dma_latency_cycles

    def load_input(self, step: Step) -> None:
        start = max(self.loader, self.input_empty[step.input], 0)
        self.loader = start + self.moving(step)
        self.input_full[step.input] = self.loader + self.geometry.dma_latency_cycles

    def multiply(self, step: Step) -> None:
        in_cells = max(self.shadow, self.weight_full[step.weight]) + step.inputs
        begun = 0 if step.flags & ACCUMULATE else self.sums_empty[step.sums]
        start = max(in_cells, self.array, self.input_full[step.input], begun)
        self.shadow, self.array = start, start + step.rows
        self.sums_full[step.sums] = self.array + step.inputs + step.outputs - 2
        if step.flags & FREE_WEIGHT:
            self.weight_empty[step.weight] = in_cells
        if step.flags & FREE_INPUT:
            self.input_empty[step.input] = self.array

    def store(self, step: Step) -> None:
        self.storer = max(self.storer, self.sums_full[step.sums]) + self.moving(step)
        self.sums_empty[step.sums] = self.storer
        self.end = self.storer + self.geometry.dma_latency_cycles


def run_cycles(geometry: SystolicArray, stream: Stream, steps: Steps, clocks: Clocks) -> tuple[int, Clocks]:
    """Return the cycles from the end of the last product to the end of this one, and the clocks then."""
    engines = _Engines(geometry, stream, clocks)
    run = {
        LOAD_WEIGHT: engines.load_weight,
        LOAD_INPUT: engines.load_input,
        MULTIPLY: engines.multiply,
        STORE: engines.store,
    }
    for step in steps:
        run[step.opcode](step)
    end = engines.end
    return end, Clocks(engines.loader - end, tuple(max(empty, engines.loader) - end for empty in engines.weight_empty))


def moved_cost(geometry: SystolicArray, stream: Stream, steps: Steps) -> Cost:
    """Return what a run does whatever its engines' times, ``cycles`` left zero."""
    loads = np.isin(steps.columns["opcode"], (LOAD_WEIGHT, LOAD_INPUT))
    stores = steps.columns["opcode"] == STORE
    moving = -(-(steps.columns["moved"] + steps.columns["fetched"]) // geometry.dma_bytes_per_cycle)
    return Cost(
        array_cycles=steps.sum_of("rows", MULTIPLY),
        dma_in_cycles=int(moving[loads].sum()),
        dma_out_cycles=int(moving[stores].sum()),
        macs=steps.macs,
        weight_bytes=steps.sum_of("moved", LOAD_WEIGHT),
        input_bytes=steps.sum_of("moved", LOAD_INPUT),
        output_bytes=steps.sum_of("moved", STORE),
        command_bytes=HEADER.itemsize + stream.commands.size * COMMAND.itemsize,
    )
