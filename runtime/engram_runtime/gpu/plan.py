"""The plan of a GPU's library, ``program.json``: what each forward pass launches, and on which memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from engram_runtime.errors import BundleError
from engram_runtime.library import ITEM_BYTES
from engram_runtime.strict_json import Fields, read_json_object, version_error

PLAN_VERSION = 1
ALIGNMENT_BYTES = 512  # of what shares a buffer; OpenCL's devices ask for up to so many
INPUT, STATE, WEIGHT, SCRATCH, TEMPORARY, OUTPUT = KINDS = (
    "input",
    "state",
    "weight",
    "scratch",
    "temporary",
    "output",
)
AWAIT = "await"
MOST_PLAN_BYTES = 256 << 20
MOST_BLOCKS, MOST_THREADS = 2**31 - 1, 1024
MOST_BYTES = 2**53

Sizes = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """Memory of the device.

    Attributes:
        kind: one of `KINDS`. Scratch memory is a forward pass's own, temporary memory a kernel's.
        key: the name of an input or a state, the place of a weight among the library's tensors or of an output among
            the pass's, the offset in scratch and temporary memory.
        bytes: how long it is.
    """

    kind: str
    key: str | int
    bytes: int

    def to_list(self) -> list[Any]:
        """Return the JSON form."""
        return [self.kind, self.key, self.bytes]

    @classmethod
    def from_list(cls, raw: object, where: str) -> Self:
        """Check and build; raises BundleError."""
        match raw:
            case [str(kind), str(key), int(size)] if kind in (INPUT, STATE) and 0 < size < MOST_BYTES:
                return cls(kind, key, size)
            case [str(kind), int(key), int(size)] if kind in KINDS[2:] and key >= 0 and 0 < size < MOST_BYTES:
                return cls(kind, key, size)
        raise BundleError(f"{where} is {raw!r:.200}, which is no place; compile again")


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a device function: blocks of threads, by axis, and its arguments."""

    function: str
    blocks: Sizes
    threads: Sizes
    arguments: tuple[Place, ...]

    def to_list(self) -> list[Any]:
        """Return the JSON form."""
        return [self.function, self.blocks, self.threads, [place.to_list() for place in self.arguments]]


@dataclass(frozen=True, slots=True)
class AwaitRows:
    """The wait until the rows of a table, by its place in manifest order, can be put into their input."""

    site: int

    def to_list(self) -> list[Any]:
        """Return the JSON form."""
        return [AWAIT, self.site]


@dataclass(frozen=True, slots=True)
class Result:
    """An output of a forward pass: logits first, then as `engram_runtime.library.LibraryInfo` says."""

    dtype: str
    shape: tuple[int, ...]
    place: Place

    def to_list(self) -> list[Any]:
        """Return the JSON form."""
        return [self.dtype, self.shape, self.place.to_list()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """What runs a graph over a fixed number of tokens, in order."""

    steps: tuple[Launch | AwaitRows, ...]
    results: tuple[Result, ...]
    scratch_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "steps": [step.to_list() for step in self.steps],
            "results": [result.to_list() for result in self.results],
            "scratch_bytes": self.scratch_bytes,
        }

    @classmethod
    def from_fields(cls, fields: Fields, where: str) -> Self:
        """Check and build; raises BundleError."""
        made = cls(
            steps=tuple(_step(raw, where) for raw in fields.items("steps")),
            results=tuple(_result(raw, where) for raw in fields.items("results")),
            scratch_bytes=fields.count("scratch_bytes"),
        )
        fields.finish()
        return made

    def check(self, temporary_bytes: int, where: str) -> None:
        """Refuse arguments outside scratch and temporary memory."""
        sizes = {SCRATCH: self.scratch_bytes, TEMPORARY: temporary_bytes}
        for place in {place for step in self.steps if isinstance(step, Launch) for place in step.arguments}:
            if place.kind in sizes and int(place.key) + place.bytes > sizes[place.kind]:
                raise BundleError(
                    f"{where} has {place.kind} memory of {sizes[place.kind]} bytes, not {place}; compile again"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The content of ``program.json``: forward passes by their function's name, and the memory of `TEMPORARY`."""

    passes: Mapping[str, ForwardPass]
    temporary_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `read_plan` reads."""
        return {
            "version": PLAN_VERSION,
            "temporary_bytes": self.temporary_bytes,
            "passes": {name: each.to_dict() for name, each in self.passes.items()},
        }

    @property
    def most_threads(self) -> int:
        """Threads of the largest block."""
        launches = (step for each in self.passes.values() for step in each.steps if isinstance(step, Launch))
        return max((math.prod(launch.threads) for launch in launches), default=1)


def read_plan(path: Path) -> Plan:
    """Read a plan; raises BundleError for what can't be one."""
    fields = Fields(read_json_object(path, max_bytes=MOST_PLAN_BYTES), path.name)
    if (version := fields.count("version")) != PLAN_VERSION:
        raise version_error(f"{path} has", version, PLAN_VERSION, "compile again")
    plan = Plan(
        temporary_bytes=fields.count("temporary_bytes"),
        passes={
            name: ForwardPass.from_fields(each, f"{path.name}.passes.{name}")
            for name, each in fields.named_objects("passes").items()
        },
    )
    fields.finish()
    for name, each in plan.passes.items():
        each.check(plan.temporary_bytes, f"{path.name}.passes.{name}")
    return plan


def _step(raw: object, where: str) -> Launch | AwaitRows:
    match raw:
        case [str(name), int(site)] if name == AWAIT and site >= 0:
            return AwaitRows(site)
        case [str(function), list(blocks), list(threads), list(arguments)]:
            places = tuple(Place.from_list(each, where) for each in arguments)
            return Launch(function, _sizes(blocks, MOST_BLOCKS, where), _sizes(threads, MOST_THREADS, where), places)
    raise BundleError(f"{where} has step {raw!r:.200}, which is none; compile again")


def _sizes(raw: list[object], most: int, where: str) -> Sizes:
    match raw:
        case [int(x), int(y), int(z)] if min(x, y, z) >= 1 and max(x, y, z) <= most:
            return x, y, z
    raise BundleError(f"{where} launches {raw!r:.200}, expected three sizes of 1 to {most}; compile again")


def _result(raw: object, where: str) -> Result:
    match raw:
        case [str(dtype), list(shape), place] if dtype in ITEM_BYTES and all(type(n) is int and n > 0 for n in shape):
            result = Result(dtype, tuple(shape), Place.from_list(place, where))
            if math.prod(shape) * ITEM_BYTES[dtype] == result.place.bytes:
                return result
    raise BundleError(f"{where} has result {raw!r:.200}, which is none; compile again")
