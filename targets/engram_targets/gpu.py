"""Targets whose graphics processor runs the layers, tables staying with the host."""

from dataclasses import dataclass
from typing import ClassVar, Self

from engram_runtime.errors import TargetError
from engram_runtime.strict_json import Fields
from engram_targets.common import Profile, choice, common_values, number, words

LANGUAGES = ("cuda", "opencl", "metal")
CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProfile(Profile):
    """A kind of graphics processor.

    Attributes:
        language: what kernels are written in: ``cuda``, ``opencl`` or ``metal``.
        arch: architecture of CUDA, such as ``sm_80``; empty for the others.
        max_threads: most threads of a block.
        shared_memory_bytes: most shared memory of a block.
        warp: threads that run in step, 1 where code may not go by it.
    """

    device: ClassVar[str] = "gpu"
    families: ClassVar[tuple[str, ...]] = ("gpu",)

    language: str
    arch: str
    max_threads: int
    shared_memory_bytes: int
    warp: int

    @classmethod
    def from_fields(cls, name: str, fields: Fields) -> Self:
        common = common_values(name, fields, cls.families)
        table = fields.fields("gpu")
        fields.finish()
        language, arch = choice(name, table, "language", LANGUAGES), table.take("arch", str)
        if (language == CUDA) != bool(arch):
            raise TargetError(f"profile {name} has arch {arch[:64]!r} for {language}, expected one for {CUDA} only")
        profile = cls(
            **common,
            language=language,
            arch=words(name, "arch", (arch,))[0] if arch else "",
            max_threads=number(name, table, "max_threads", 32, 1024),
            shared_memory_bytes=number(name, table, "shared_memory_bytes", 1 << 12, 1 << 20),
            warp=number(name, table, "warp", 1, 128),
        )
        table.finish()
        return profile
