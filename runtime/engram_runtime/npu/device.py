"""What an accelerator is to the runtime: integer products run from command streams, and what they cost.

With `engram_compilers.npu.device` this is the whole interface of a device; docs/adding-a-device.md says how to add one.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TargetError
from engram_runtime.strict_json import Fields

AGAIN = "compile the bundle again"  # what ends every error about commands
GROUP = 32  # inputs that share a multiplier and a zero of int4 weights
MOST_INPUTS = 2**17 - 1  # of a product: sums of int8 products, each at most 2**14, then fit int32
MOST_ROWS = 2**16
MOST_OUTPUTS = 2**24
SUM_BYTES = 4
WEIGHT_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The integer product ``sums i32 [R, N] = planes i8 [R, K] x transposed weight i8 [N, K]``, exact.

    Attributes:
        rows: the most rows (R) of one run: planes of a row count as rows.
        inputs: K. ``outputs``: N.
        weights: ``int8``, or ``int4`` for (code - zero) * multiplier with groups of 32 inputs.
        routed: whether where the weight lies is known no sooner than the planes, as an expert's is.
    """

    rows: int
    inputs: int
    outputs: int
    weights: str
    routed: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_BITS:
            raise TargetError(f"a product has weights {self.weights!r}, devices take {list(WEIGHT_BITS)}")
        for name, most in (("rows", MOST_ROWS), ("inputs", MOST_INPUTS), ("outputs", MOST_OUTPUTS)):
            if not 1 <= getattr(self, name) <= most:
                raise TargetError(f"a product has {getattr(self, name)} {name}, devices take 1 to {most}")
        if self.weights == "int4" and self.inputs % GROUP:
            raise TargetError(f"a product of int4 weights has {self.inputs} inputs, wanted a multiple of {GROUP}")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight with no padding: of int4 with a byte for each group of an output."""
        groups = self.inputs // GROUP if self.weights == "int4" else 0
        return self.outputs * (self.inputs * WEIGHT_BITS[self.weights] // 8 + groups)

    def macs(self, rows: int) -> int:
        """Return the multiply-accumulates of a run of ``rows``."""
        return rows * self.inputs * self.outputs

    def compulsory_bytes(self, rows: int) -> int:
        """Return the least a run of ``rows`` can move: weight, planes and sums, each once."""
        return self.weight_bytes + rows * self.inputs + rows * self.outputs * SUM_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What runs took; costs of runs add up.

    Attributes:
        cycles: from the end of the device's previous run to the end of this one, the host taking no time between them.
        array_cycles: with the array multiplying. ``dma_in_cycles``, ``dma_out_cycles``: with that engine moving bytes.
        macs: multiply-accumulates done.
        weight_bytes, input_bytes, output_bytes, command_bytes: moved between memory and the device.
    """

    cycles: int = 0
    array_cycles: int = 0
    dma_in_cycles: int = 0
    dma_out_cycles: int = 0
    macs: int = 0
    weight_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    command_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)})

    @property
    def dma_bytes(self) -> int:
        """Bytes moved in both directions, commands included."""
        return self.weight_bytes + self.input_bytes + self.output_bytes + self.command_bytes


class Geometry(Protocol):
    """The sizes of an accelerator, a frozen dataclass of integers.

    Attributes:
        accelerator: its name in `engram_runtime.npu.devices.ACCELERATORS`.
        clock_hz: cycles a second.
        macs_per_cycle: multiply-accumulates it does at most in a cycle.
    """

    accelerator: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def clock_hz(self) -> int: ...

    @property
    def macs_per_cycle(self) -> int: ...

    @classmethod
    def from_fields(cls, where: str, fields: Fields) -> Self:
        """Check and build from a profile's or a library's table; ``where`` names it.

        Raises:
            BundleError: a size is missing or no integer.
            TargetError: sizes no device can have.
        """
        ...


def sizes(where: str, fields: Fields, limits: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Take a table's sizes, each in its limits.

    Raises:
        BundleError: a size is missing or no integer, or a key is unknown.
        TargetError: a size is outside its limits.
    """
    taken = {key: fields.take(key, int) for key in limits}
    fields.finish()
    for key, (least, most) in limits.items():
        if not least <= taken[key] <= most:
            raise TargetError(f"{where} has {key} {taken[key]}, expected {least} to {most}")
    return taken


class Program(Protocol):
    """A command stream that was checked, ready to run any number of times."""

    @property
    def product(self) -> Product: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as the device's compiler packs it."""
        ...

    def run(self, weights: NDArray[np.uint8], planes: NDArray[np.int8]) -> tuple[NDArray[np.int32], Cost]:
        """Run once.

        Args:
            weights: ``[B]``, memory from the weight's base on, as the device's compiler packed it; B is at least
                ``weight_bytes``.
            planes: ``[R, C]``, R at most ``product.rows`` and C at least ``product.inputs``; what lies in
                further columns is not read.

        Returns:
            sums ``[R, N]``, a fresh array, and the cost.
        """
        ...


class Device(Protocol):
    """An accelerator, or what simulates it. It runs one product at a time, in the order of the calls."""

    @property
    def geometry(self) -> Geometry: ...

    def load(self, commands: bytes) -> Program:
        """Check a command stream.

        Raises:
            TargetError: it is damaged, of another device or geometry, or would not run to its end.
        """
        ...
