"""Execute command streams of the systolic array: exact sums, and the cycles the array would take."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engram_runtime.npu.device import Cost, Product
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.isa import ACCUMULATE, LOAD_INPUT, LOAD_WEIGHT, MULTIPLY, Stream, decode
from engram_runtime.npu.order import check_order
from engram_runtime.npu.steps import Step, Steps, steps_of
from engram_runtime.npu.tiles import unpacked_tile
from engram_runtime.npu.timing import Clocks, at_rest, moved_cost, run_cycles


class Simulator:
    """A systolic array that runs on this machine's processor."""

    def __init__(self, geometry: SystolicArray) -> None:
        self.geometry = geometry
        self.clocks = at_rest(geometry)

    def load(self, commands: bytes) -> "LoadedStream":
        """Check a command stream; raises TargetError."""
        stream = decode(self.geometry, commands)
        check_order(self.geometry, stream)
        return LoadedStream(self, stream)


class LoadedStream:
    """A stream a `Simulator` has checked; what it took is remembered by its rows and the clocks it began with."""

    def __init__(self, device: Simulator, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._cycles: dict[tuple[int, Clocks], tuple[int, Clocks]] = {}
        self._moved: dict[int, Cost] = {}

    @property
    def product(self) -> Product:
        return self._stream.product

    @property
    def weight_bytes(self) -> int:
        return self.product.weight_bytes

    def run(self, weights: NDArray[np.uint8], planes: NDArray[np.int8]) -> tuple[NDArray[np.int32], Cost]:
        """Run once: see `engram_runtime.npu.device.Program`."""
        rows = len(planes)
        steps = steps_of(self._device.geometry, self._stream, rows)
        return _sums(self.product, steps, weights, planes), self._cost(steps, rows)

    def _cost(self, steps: Steps, rows: int) -> Cost:
        geometry, clocks = self._device.geometry, self._device.clocks
        if rows not in self._moved:
            self._moved[rows] = moved_cost(geometry, self._stream, steps)
        if (rows, clocks) not in self._cycles:
            self._cycles[rows, clocks] = run_cycles(geometry, self._stream, steps, clocks)
        cycles, self._device.clocks = self._cycles[rows, clocks]
        return replace(self._moved[rows], cycles=cycles)


def _sums(product: Product, steps: Steps, weights: NDArray[np.uint8], planes: NDArray[np.int8]) -> NDArray[np.int32]:
    """Execute the commands in the stream's order; `check_order` says why it is as good as any."""
    result = np.empty((len(planes), product.outputs), np.int32)
    tiles: dict[int, NDArray[np.float32]] = {}  # the scratchpads, by slot
    inputs: dict[int, NDArray[np.float32]] = {}
    sums: dict[int, NDArray[np.int32]] = {}
    for step in steps:
        if step.opcode == LOAD_WEIGHT:
            packed = weights[step.place : step.place + step.moved]
            tiles[step.weight] = unpacked_tile(packed, step.inputs, step.outputs, product.weights)
        elif step.opcode == LOAD_INPUT:
            inputs[step.input] = planes[_of(step.row, step.rows), _of(step.column, step.inputs)].astype(np.float32)
        elif step.opcode == MULTIPLY:
            _multiply(sums, step, inputs[step.input] @ tiles[step.weight])
        else:
            result[_of(step.row, step.rows), _of(step.output, step.outputs)] = sums[step.sums]
    return result


def _of(first: int, count: int) -> slice:
    return slice(first, first + count)


def _multiply(sums: dict[int, NDArray[np.int32]], step: Step, products: NDArray[np.float32]) -> None:
    """Add a tile's products, at most 1024 of 2**14 at most: float32 counts them exactly in any order."""
    if step.flags & ACCUMULATE:
        sums[step.sums] += products.astype(np.int32)
    else:
        sums[step.sums] = products.astype(np.int32)
