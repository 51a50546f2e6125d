"""The accelerators there are, by name."""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engram_runtime.errors import BundleError, TargetError
from engram_runtime.npu.device import Device, Geometry
from engram_runtime.npu.dot_engine import DotEngine, DotEngineSimulator
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.simulator import Simulator
from engram_runtime.strict_json import Fields


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


def parse_geometry(accelerator: str, table: object, where: str) -> Geometry:
    """Read an accelerator's sizes from a table of a profile or a library; ``where`` names it.

    Raises:
        TargetError: no such accelerator, or sizes it can't have.
    """
    if accelerator not in ACCELERATORS:
        raise TargetError(f"{where} is for accelerator {reprlib.repr(accelerator)}, there are {list(ACCELERATORS)}")
    try:
        return ACCELERATORS[accelerator].geometry.from_fields(where, Fields(table, f"{where}.npu"))
    except BundleError as error:
        raise TargetError(str(error)) from error


def open_device(geometry: Geometry) -> Device:
    """Open the simulator of an accelerator."""
    return ACCELERATORS[geometry.accelerator].open(geometry)
