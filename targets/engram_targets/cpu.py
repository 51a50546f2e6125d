"""Targets whose processor runs the whole model."""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from engram_runtime.errors import TargetError
from engram_runtime.executor import MOST_THREADS
from engram_runtime.strict_json import Fields
from engram_targets.common import Profile, choice, common_values, words

KERNEL_FAMILIES = ("amx", "avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", "neon_i8mm", "portable")
TRIPLES = {"linux": "linux-gnu", "macos": "apple-macos", "wasi": "wasi"}  # by system, what follows the architecture
SYSTEMS = tuple(TRIPLES)
AUTO_THREADS = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Llvm:
    """What LLVM is told.

    Attributes:
        mtriple: target triple, of the profile's machine and system.
        mcpu: processor, the one with the least that code may use: LLVM uses all that it has, whatever ``cpu_flags``
            say.
        mattr: features beside the processor's, such as ``+v``, or without, such as ``-sha3``.
        mabi: calling convention, empty for the usual one.
    """

    mtriple: str
    mcpu: str
    mattr: tuple[str, ...]
    mabi: str

    @property
    def target(self) -> dict[str, Any]:
        """The target as TVM takes it."""
        described: dict[str, Any] = {"kind": "llvm", "mtriple": self.mtriple, "mcpu": self.mcpu}
        if self.mattr:
            described["mattr"] = list(self.mattr)
        if self.mabi:
            described["mabi"] = self.mabi
        return described

    @classmethod
    def from_fields(cls, name: str, fields: Fields) -> Self:
        mtriple, mcpu, mabi = (fields.take(key, str) for key in ("mtriple", "mcpu", "mabi"))
        mattr = words(name, "mattr", fields.texts("mattr"))
        fields.finish()
        words(name, "mtriple", (mtriple,))
        words(name, "mcpu", (mcpu,))
        words(name, "mabi", (mabi,) if mabi else ())
        return cls(mtriple=mtriple, mcpu=mcpu, mattr=mattr, mabi=mabi)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuProfile(Profile):
    """A kind of processor.

    Attributes:
        machine: instruction set architecture as ``uname -m`` spells it.
        system: ``linux``, ``macos`` or ``wasi``.
        cpu_flags: features the code needs, as ``/proc/cpuinfo`` spells them.
        threads: how many run the library unless told otherwise; 0, in files ``auto``, is one on each core there is.
        llvm: what LLVM is told.
    """

    device: ClassVar[str] = "cpu"
    families: ClassVar[tuple[str, ...]] = KERNEL_FAMILIES

    machine: str
    system: str
    cpu_flags: tuple[str, ...]
    threads: int
    llvm: Llvm

    @classmethod
    def from_fields(cls, name: str, fields: Fields) -> Self:
        common = common_values(name, fields, cls.families)
        profile = cls(
            **common,
            machine=words(name, "machine", (fields.take("machine", str),))[0],
            system=choice(name, fields, "system", SYSTEMS),
            cpu_flags=words(name, "cpu_flags", fields.texts("cpu_flags")),
            threads=_threads(name, fields),
            llvm=Llvm.from_fields(name, fields.fields("llvm")),
        )
        fields.finish()
        profile.check()
        return profile

    def check(self) -> None:
        """Refuse a triple of another machine than the profile's, whose code no box would load; raises TargetError."""
        start = f"{self.machine}-{TRIPLES[self.system]}"
        if not self.llvm.mtriple.startswith(start):
            raise TargetError(
                f"profile {self.name} has mtriple {self.llvm.mtriple!r}, expected one for {self.system} on "
                f"{self.machine}, which begins with {start!r}"
            )

    def fits(self, architecture: str, flags: Iterable[str]) -> bool:
        """Whether a machine with these CPU flags can run the code."""
        return self.machine == architecture and set(self.cpu_flags) <= set(flags)


def _threads(name: str, fields: Fields) -> int:
    value = fields.value("threads")
    if value == AUTO_THREADS:
        return 0
    if type(value) is not int or not 1 <= value <= MOST_THREADS:
        raise TargetError(
            f"profile {name} has threads {reprlib.repr(value)}, expected {AUTO_THREADS!r} or 1 to {MOST_THREADS}"
        )
    return value
