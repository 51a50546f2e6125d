"""A second accelerator, small enough to be read whole: lanes of dot products, no scratchpad for weights or sums.

Rows of inputs are held in a buffer. Weights stream from memory past the lanes, ``lanes`` outputs at a time; a lane
multiplies ``width`` inputs a cycle for each row in turn and keeps the rows' sums in its registers.

A stream is a header and words of 32 bits: an opcode in the 4 high bits, below it the first row to hold (ROWS) or the
lanes' worth of outputs to compute (DOT). The weight is int8 ``[N/lanes, K/width, lanes, width]``, padded with zeros;
the cost counts padding as work.
"""

from dataclasses import astuple, dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TargetError
from engram_runtime.npu.device import AGAIN, SUM_BYTES, WEIGHT_BITS, Cost, Product, sizes
from engram_runtime.strict_json import Fields

MAGIC = b"DOTS"
HEADER = np.dtype([("magic", "S4"), ("geometry", "<u8", 6), ("product", "<u4", 5)])
OPCODE_BYTES, OPCODE_SHIFT = 4, 28
ROWS, DOT = 1, 2
LIMITS = {
    "lanes": (1, 1024),
    "width": (1, 64),
    "registers": (1, 1024),
    "input_bytes": (1, 1 << 30),
    "dma_bytes_per_cycle": (1, 4096),
    "clock_hz": (1, 10**11),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DotEngine:
    """Lanes that each multiply a few inputs a cycle and add them up; weights stream past them from memory.

    Attributes:
        lanes: outputs computed at a time.
        width: inputs a lane multiplies in a cycle.
        registers: rows a lane keeps sums of.
        input_bytes: buffer of rows of inputs, a byte each.
        dma_bytes_per_cycle: between memory and the engine.
        clock_hz: cycles a second.
    """

    accelerator: ClassVar[str] = "dot-engine"

    lanes: int
    width: int
    registers: int
    input_bytes: int
    dma_bytes_per_cycle: int
    clock_hz: int

    @classmethod
    def from_fields(cls, where: str, fields: Fields) -> Self:
        """Check and build: see `engram_runtime.npu.device.Geometry`."""
        return cls(**sizes(where, fields, LIMITS))

    @property
    def macs_per_cycle(self) -> int:
        return self.lanes * self.width

    def row_block(self, product: Product) -> int:
        """Return how many rows are held at a time.

        Raises:
            TargetError: not even one fits.
        """
        if product.inputs > self.input_bytes:
            raise TargetError(
                f"a product has {product.inputs} inputs, the dot engine holds {self.input_bytes}; "
                "give it more input_bytes"
            )
        return min(self.registers, self.input_bytes // product.inputs, product.rows)

    def padded(self, product: Product) -> tuple[int, int]:
        """Return the product's outputs in lanes' worths and its inputs in widths."""
        return -(-product.outputs // self.lanes), -(-product.inputs // self.width)


def header(geometry: DotEngine, product: Product) -> bytes:
    """Return the first bytes of a product's stream."""
    shape = (product.rows, product.inputs, product.outputs, WEIGHT_BITS[product.weights], int(product.routed))
    return np.array((MAGIC, astuple(geometry), shape), HEADER).tobytes()


def words(geometry: DotEngine, product: Product) -> NDArray[np.uint32]:
    """Return the commands of a product: of every block of rows ROWS, then DOT for all outputs."""
    first_rows = np.arange(0, product.rows, geometry.row_block(product)) | ROWS << OPCODE_SHIFT
    outputs = np.arange(geometry.padded(product)[0]) | DOT << OPCODE_SHIFT
    blocks = np.empty((first_rows.size, 1 + outputs.size), np.uint32)
    blocks[:, 0], blocks[:, 1:] = first_rows, outputs
    return blocks.reshape(-1)


class DotEngineSimulator:
    """A dot engine that runs on this machine's processor."""

    def __init__(self, geometry: DotEngine) -> None:
        self.geometry = geometry

    def load(self, commands: bytes) -> "LoadedWords":
        """Check a command stream; raises TargetError."""
        if len(commands) < HEADER.itemsize or not commands.startswith(MAGIC):
            raise TargetError(f"{len(commands)} bytes are no command stream of a dot engine; {AGAIN}")
        rows, inputs, outputs, bits, routed = np.frombuffer(commands, HEADER, count=1)["product"][0].tolist()
        weights = {bits: name for name, bits in WEIGHT_BITS.items()}.get(bits, f"of {bits} bits")
        product = Product(rows=rows, inputs=inputs, outputs=outputs, weights=weights, routed=routed != 0)
        if not commands.startswith(header(self.geometry, product)):
            raise TargetError(f"a command stream is for another dot engine than {self.geometry}; {AGAIN}")
        blocks = -(-rows // self.geometry.row_block(product))
        size = HEADER.itemsize + blocks * (1 + self.geometry.padded(product)[0]) * OPCODE_BYTES
        if len(commands) != size:
            raise TargetError(f"a command stream of a dot engine has {len(commands)} bytes, wanted {size}; {AGAIN}")
        if commands[HEADER.itemsize :] != words(self.geometry, product).tobytes():
            raise TargetError(f"a command stream of a dot engine does not compute its product; {AGAIN}")
        return LoadedWords(self.geometry, product, commands)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedWords:
    """A stream a `DotEngineSimulator` has checked."""

    geometry: DotEngine
    product: Product
    commands: bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight: of int4 as many as of int8, since nothing unpacks it on the way."""
        outputs, inputs = self.geometry.padded(self.product)
        return outputs * inputs * self.geometry.macs_per_cycle

    def run(self, weights: NDArray[np.uint8], planes: NDArray[np.int8]) -> tuple[NDArray[np.int32], Cost]:
        """Run once: see `engram_runtime.npu.device.Program`."""
        outputs, inputs = self.geometry.padded(self.product)
        lanes, width = self.geometry.lanes, self.geometry.width
        packed = weights[: self.weight_bytes].view(np.int8).reshape(outputs, inputs, lanes, width)
        sums = np.zeros((len(planes), outputs * lanes), np.int32)
        held = np.zeros((0, inputs * width), np.int32)
        row, cost = 0, Cost(command_bytes=len(self.commands))
        for word in np.frombuffer(self.commands, "<u4", offset=HEADER.itemsize).tolist():
            opcode, operand = word >> OPCODE_SHIFT, word & (1 << OPCODE_SHIFT) - 1
            if opcode == ROWS:
                row, held = operand, self._rows(planes, operand)
                cost += self._loaded(len(held))
            elif len(held):
                weight = packed[operand].transpose(0, 2, 1).reshape(-1, lanes).astype(np.int32)  # [K, lanes]
                sums[row : row + len(held), operand * lanes : (operand + 1) * lanes] = held @ weight
                cost += self._multiplied(len(held))
        return sums[:, : self.product.outputs].copy(), cost

    def _rows(self, planes: NDArray[np.int8], first: int) -> NDArray[np.int32]:
        """Return the rows held from ``first`` on, ``[m, K]`` padded with zeros."""
        taken = planes[first : first + self.geometry.row_block(self.product), : self.product.inputs]
        held = np.zeros((len(taken), self.geometry.padded(self.product)[1] * self.geometry.width), np.int32)
        held[:, : self.product.inputs] = taken
        return held

    def _loaded(self, rows: int) -> Cost:
        cycles = self._moving(rows * self.product.inputs)
        return Cost(cycles=cycles, dma_in_cycles=cycles, input_bytes=rows * self.product.inputs)

    def _multiplied(self, rows: int) -> Cost:
        """Return what a DOT takes: weights stream in while the lanes work, then the sums are written."""
        inputs, macs = self.geometry.padded(self.product)[1], self.geometry.macs_per_cycle
        weight_bytes, output_bytes = inputs * macs, rows * self.geometry.lanes * SUM_BYTES
        streaming, storing = self._moving(weight_bytes), self._moving(output_bytes)
        return Cost(
            cycles=max(rows * inputs, streaming) + storing,
            array_cycles=rows * inputs,
            dma_in_cycles=streaming,
            dma_out_cycles=storing,
            macs=rows * inputs * macs,
            weight_bytes=weight_bytes,
            output_bytes=output_bytes,
        )

    def _moving(self, count: int) -> int:
        return -(-count // self.geometry.dma_bytes_per_cycle)
