"""Targets that give the products of linear layers to an accelerator and do the rest on a host processor."""

from dataclasses import dataclass
from typing import ClassVar, Self

from engram_runtime.npu.device import Geometry
from engram_runtime.npu.devices import ACCELERATORS, parse_geometry
from engram_runtime.strict_json import Fields
from engram_targets.common import Profile, common_values
from engram_targets.cpu import CpuProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuProfile(Profile):
    """An accelerator beside a host processor.

    Attributes:
        host: the processor that does all but the products, a profile's name or ``native`` in files.
        geometry: the accelerator's sizes, the table ``npu`` in files.
    """

    device: ClassVar[str] = "npu"
    families: ClassVar[tuple[str, ...]] = tuple(ACCELERATORS)

    host: CpuProfile
    geometry: Geometry

    @classmethod
    def from_fields(cls, name: str, fields: Fields, host: CpuProfile) -> Self:
        common = common_values(name, fields, cls.families)
        geometry = parse_geometry(common["kernels"], fields.value("npu"), f"profile {name}")
        fields.finish()
        return cls(**common, host=host, geometry=geometry)
