"""The accelerators there are, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engram_runtime.errors import TargetError
from engram_runtime.npu.device import Device, Geometry
from engram_runtime.npu.dot_engine import DotEngine, DotEngineSimulator
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.simulator import Simulator


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What a kind of accelerator needs to run.

    Attributes:
        geometry: reads its sizes.
        open: opens a device of these sizes.
    """

    geometry: type[Geometry]
    open: Callable[[Any], Device]


ACCELERATORS = {
    "systolic": Accelerator(SystolicArray, Simulator),
    "dot-engine": Accelerator(DotEngine, DotEngineSimulator),
}


def parse_geometry(accelerator: str, raw: Mapping[str, Any]) -> Geometry:
    """Read an accelerator's sizes from a profile's or a library's table; raises TargetError."""
    if accelerator not in ACCELERATORS:
        raise TargetError(f"accelerator {accelerator!r} is unknown; there are {list(ACCELERATORS)}")
    return ACCELERATORS[accelerator].geometry.from_dict(raw)


def open_device(geometry: Geometry) -> Device:
    """Open the simulator of an accelerator."""
    return ACCELERATORS[geometry.accelerator].open(geometry)
