"""Targets that give the products of linear layers to a systolic array and do the rest on a host processor."""

from dataclasses import dataclass
from typing import ClassVar, Self

from engram_runtime.errors import TargetError
from engram_runtime.strict_json import Fields
from engram_targets.common import Profile, common_values, number
from engram_targets.cpu import CpuProfile

SUM_BYTES = 4  # of an int32
MOST_CELLS = 1024  # along one side; 65,536 products of int8 fit a sum, see `check`
MOST_SCRATCHPAD = 1 << 30
SYSTOLIC_ARRAY_KEYS = {  # least and most of each
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
        rows, columns: inputs and outputs of one tile of weights, which the array holds.
        weight_bytes: scratchpad of tiles of weights, a byte a weight.
        input_bytes: scratchpad of inputs, a byte each.
        accumulator_bytes: scratchpad of sums, 4 bytes each.
        dma_bytes_per_cycle: between memory and scratchpads.
        dma_latency_cycles: before a transfer's first bytes arrive.
        clock_hz: cycles a second.
    """

    rows: int
    columns: int
    weight_bytes: int
    input_bytes: int
    accumulator_bytes: int
    dma_bytes_per_cycle: int
    dma_latency_cycles: int
    clock_hz: int

    @classmethod
    def from_fields(cls, name: str, fields: Fields) -> Self:
        array = cls(**{key: number(name, fields, key, *limits) for key, limits in SYSTOLIC_ARRAY_KEYS.items()})
        fields.finish()
        array.check(name)
        return array

    def check(self, name: str) -> None:
        """Refuse a geometry that can't be: scratchpads are filled while they are read, so each holds two of its tiles.

        Raises:
            TargetError: a scratchpad is too small for the array, or is no whole number of transfers.
        """
        beat = self.dma_bytes_per_cycle
        if self.rows % 4 or self.columns % 4:
            raise TargetError(
                f"profile {name} has an array of {self.rows} x {self.columns} cells, expected multiples of 4"
            )
        for key, least, what in (
            ("weight_bytes", 2 * self.rows * self.columns, f"two tiles of {self.rows} x {self.columns} weights"),
            ("input_bytes", 2 * self.rows, f"two rows of {self.rows} inputs"),
            ("accumulator_bytes", 2 * SUM_BYTES * self.columns, f"two rows of {self.columns} sums"),
        ):
            held = getattr(self, key)
            if held < least:
                raise TargetError(f"profile {name} has {key} {held}, {what} need {least}")
            if held % beat:
                raise TargetError(f"profile {name} has {key} {held}, expected a multiple of dma_bytes_per_cycle {beat}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuProfile(Profile):
    """A systolic array beside a host processor.

    Attributes:
        host: the processor that does all but the products, a profile's name or ``native`` in files.
        array: the device.
    """

    device: ClassVar[str] = "npu"
    families: ClassVar[tuple[str, ...]] = ("systolic",)

    host: CpuProfile
    array: SystolicArray

    @classmethod
    def from_fields(cls, name: str, fields: Fields, host: CpuProfile) -> Self:
        profile = cls(
            **common_values(name, fields, cls.families),
            host=host,
            array=SystolicArray.from_fields(name, fields.fields("npu")),
        )
        fields.finish()
        return profile
