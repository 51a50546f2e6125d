"""The sizes of a systolic array and of the memories around it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from engram_runtime.errors import TargetError
from engram_runtime.npu.device import GROUP, SUM_BYTES
from engram_runtime.npu.sizes import parsed_sizes

MOST_ROWS = 1024  # sums of so many int8 products stay within 2**24, which float32 counts exactly
MOST_COLUMNS = 4096
MOST_SLOTS = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class SystolicArray:
    """A weight-stationary array: a weight tile stays in the cells while rows of inputs stream through.

    Attributes:
        rows: inputs (K) of a weight tile. ``columns``: its outputs (N). A cell multiplies and adds once a cycle.
        weight_bytes, input_bytes, accumulator_bytes: the scratchpads.
        dma_bytes_per_cycle: what memory gives, and what it takes at the same time.
        dma_latency_cycles: from the last byte asked for to its arrival.
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
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Check and build; raises TargetError."""
        geometry = cls(**parsed_sizes("a systolic array", [field.name for field in fields(cls)], raw))
        geometry.check()
        return geometry

    def check(self) -> None:
        """Refuse sizes no array can have, one TargetError for the first that is wrong."""
        if self.rows % GROUP or not GROUP <= self.rows <= MOST_ROWS:
            raise TargetError(
                f"a systolic array has {self.rows} rows, wanted a multiple of {GROUP} from {GROUP} to {MOST_ROWS}"
            )
        if not 1 <= self.columns <= MOST_COLUMNS:
            raise TargetError(f"a systolic array has {self.columns} columns, wanted 1 to {MOST_COLUMNS}")
        for name in ("dma_bytes_per_cycle", "clock_hz"):
            if getattr(self, name) < 1:
                raise TargetError(f"a systolic array has {name} {getattr(self, name)}, wanted at least 1")
        self._check_scratchpads()

    def _check_scratchpads(self) -> None:
        least = {
            "weight_bytes": (self.rows * self.columns, "a weight tile"),
            "input_bytes": (self.rows, "a row of a tile's inputs"),
            "accumulator_bytes": (self.columns * SUM_BYTES, "a row of a tile's sums"),
        }
        for name, (held, what) in least.items():
            if not 2 * held <= getattr(self, name) <= MOST_SLOTS * held:
                raise TargetError(
                    f"a systolic array of {self.rows} x {self.columns} has {name} {getattr(self, name)}, "
                    f"wanted {2 * held} to {MOST_SLOTS * held}: {what} of {held} bytes at least twice"
                )

    @property
    def macs_per_cycle(self) -> int:
        return self.rows * self.columns

    @property
    def weight_slots(self) -> int:
        """Weight tiles the scratchpad holds."""
        return self.weight_bytes // (self.rows * self.columns)
