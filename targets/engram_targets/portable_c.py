"""Targets that are taken as C sources."""

from dataclasses import dataclass
from typing import ClassVar, Self

from engram_runtime.strict_json import Fields
from engram_targets.common import Profile, common_values


@dataclass(frozen=True, slots=True, kw_only=True)
class CProfile(Profile):
    """Any box with a C compiler: portable kernels as C sources, without Python."""

    device: ClassVar[str] = "c"
    families: ClassVar[tuple[str, ...]] = ("portable",)

    @classmethod
    def from_fields(cls, name: str, fields: Fields) -> Self:
        profile = cls(**common_values(name, fields, cls.families))
        fields.finish()
        return profile
