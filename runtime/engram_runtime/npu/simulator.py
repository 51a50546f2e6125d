"""Execute command streams of the systolic array: exact sums, and the cycles the array would take."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engram_runtime.npu.device import Cost, Product
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.isa import ACCUMULATE, LOAD_INPUT, LOAD_WEIGHT, MULTIPLY, Stream, decode
from engram_runtime.npu.order import check_order
from engram_runtime.npu.steps import Step, Steps, steps_of
from engram_runtime.npu.tiles import Tiles, unpacked
from engram_runtime.npu.timing import Clocks, at_rest, moved_cost, run_cycles

ONE_THREAD = 2**18  # multiplications that OpenBLAS does without its threads, which cost more than a tile takes


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
        tiles = Tiles(self._device.geometry, self.product)
        return _sums(steps, unpacked(weights, tiles), planes, self.product.outputs), self._cost(steps, rows)

    def _cost(self, steps: Steps, rows: int) -> Cost:
        geometry = self._device.geometry
        clocks = at_rest(geometry) if self.product.routed else self._device.clocks  # routed loads wait for the planes
        if rows not in self._moved:
            self._moved[rows] = moved_cost(geometry, self._stream, steps)
        if (rows, clocks) not in self._cycles:
            self._cycles[rows, clocks] = run_cycles(geometry, self._stream, steps, clocks)
        cycles, self._device.clocks = self._cycles[rows, clocks]
        return replace(self._moved[rows], cycles=cycles)


def _sums(steps: Steps, weights: NDArray[np.int8], planes: NDArray[np.int8], outputs: int) -> NDArray[np.int32]:
    """Execute the commands in the stream's order; `engram_runtime.npu.order` says why it is as good as any."""
    result = np.empty((len(planes), outputs), np.int32)
    tiles: dict[int, NDArray[np.float32]] = {}  # the scratchpads, by slot
    inputs: dict[int, NDArray[np.float32]] = {}
    sums: dict[int, NDArray[np.int32]] = {}
    for step in steps:
        if step.opcode == LOAD_WEIGHT:
            tile = weights[_of(step.place, step.inputs * step.outputs)]
            tiles[step.weight] = tile.reshape(step.inputs, step.outputs).astype(np.float32)
        elif step.opcode == LOAD_INPUT:
            inputs[step.input] = planes[_of(step.row, step.rows), _of(step.column, step.inputs)].astype(np.float32)
        elif step.opcode == MULTIPLY:
            _multiply(sums, step, _products(inputs[step.input], tiles[step.weight]))
        else:
            result[_of(step.row, step.rows), _of(step.output, step.outputs)] = sums[step.sums]
    return result


def _of(first: int, count: int) -> slice:
    return slice(first, first + count)


def _products(inputs: NDArray[np.float32], tile: NDArray[np.float32]) -> NDArray[np.int32]:
    """Multiply; at most 1024 products of at most 2**14 are summed, which float32 counts exactly in any order."""
    piece = max(1, ONE_THREAD // tile.size)
    parts = [inputs[_of(first, piece)] @ tile for first in range(0, len(inputs), piece)]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int32)


def _multiply(sums: dict[int, NDArray[np.int32]], step: Step, products: NDArray[np.int32]) -> None:
    if step.flags & ACCUMULATE:
        sums[step.sums] += products
    else:
        sums[step.sums] = products
