"""The sizes of a systolic array and of the memories around it."""

from dataclasses import dataclass
from typing import ClassVar, Self

from engram_runtime.errors import TargetError
from engram_runtime.npu.device import GROUP, SUM_BYTES, sizes
from engram_runtime.strict_json import Fields

MOST_CELLS = 1024  # along one side: so many int8 products sum up to 2**24, which float32 counts exactly
COLUMN_MULTIPLE = 4
MOST_SCRATCHPAD = 1 << 30
LIMITS = {  # least and most of each
    "rows": (1, MOST_CELLS),
    "columns": (1, MOST_CELLS),
    "weight_bytes": (1, MOST_SCRATCHPAD),
    "input_bytes": (1, MOST_SCRATCHPAD),
    "accumulator_bytes": (1, MOST_SCRATCHPAD),
    "dma_bytes_per_cycle": (1, 4096),
    "dma_latency_cycles": (0, 1 << 20),
    "clock_hz": (1, 10**11),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SystolicArray:
    """A weight-stationary array of cells that multiply bytes and add to 32 bits, one product a cell and cycle.

    Attributes:
        rows, columns: inputs and outputs of one tile of weights, which the array holds while inputs stream through.
        weight_bytes: scratchpad of tiles of weights, a byte a weight.
        input_bytes: scratchpad of inputs, a byte each.
        accumulator_bytes: scratchpad of sums, 4 bytes each.
        dma_bytes_per_cycle: from memory to scratchpads, and as many back at the same time.
        dma_latency_cycles: from the end of a transfer to the arrival of its last bytes.
        clock_hz: cycles a second.
    """

    accelerator: ClassVar[str] = "systolic"

    rows: int
    columns: int
    weight_bytes: int
    input_bytes: int
    accumulator_bytes: int
    dma_bytes_per_cycle: int
    dma_latency_cycles: int
    clock_hz: int

    @classmethod
    def from_fields(cls, where: str, fields: Fields) -> Self:
        """Check and build: see `engram_runtime.npu.device.Geometry`."""
        array = cls(**sizes(where, fields, LIMITS))
        array.check(where)
        return array

    def check(self, where: str) -> None:
        """Refuse a geometry that can't be: scratchpads are filled while they are read, so each holds two of its tiles.

        Raises:
            TargetError: a scratchpad is too small for the array, or is no whole number of transfers.
        """
        if self.rows % GROUP or self.columns % COLUMN_MULTIPLE:
            raise TargetError(
                f"{where} has an array of {self.rows} x {self.columns} cells, expected multiples of {GROUP} and "
                f"{COLUMN_MULTIPLE}"
            )
        beat = self.dma_bytes_per_cycle
        for key, least, what in (
            ("weight_bytes", 2 * self.rows * self.columns, f"two tiles of {self.rows} x {self.columns} weights"),
            ("input_bytes", 2 * self.rows, f"two rows of {self.rows} inputs"),
            ("accumulator_bytes", 2 * SUM_BYTES * self.columns, f"two rows of {self.columns} sums"),
        ):
            held = getattr(self, key)
            if held < least:
                raise TargetError(f"{where} has {key} {held}, {what} need {least}")
            if held % beat:
                raise TargetError(f"{where} has {key} {held}, expected a multiple of dma_bytes_per_cycle {beat}")

    @property
    def macs_per_cycle(self) -> int:
        return self.rows * self.columns
