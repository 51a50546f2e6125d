"""Read target profiles and find the one that fits this machine."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

from engram_runtime.cpu import machine, usable_cpu_flags
from engram_runtime.errors import TargetError
from engram_runtime.executor import MOST_THREADS

NATIVE = "native"
KEYS = {"machine", "cpu_flags", "kernels", "decode_tokens", "prefill_tokens", "threads", "cache_dtype", "llvm"}
AUTO_THREADS = "auto"
MOST_SEQUENCES = 8  # of one pass: attention's kernel holds its code once for each
CACHE_DTYPES = ("float32", "float16")
KERNEL_FAMILIES = ("amx", "avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", "neon_i8mm", "portable")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetProfile:
    """A kind of machine.

    Attributes:
        machine: instruction set architecture as ``uname -m`` spells it.
        cpu_flags: features the code needs, as ``/proc/cpuinfo`` spells them.
        kernels: kernel family, a module of `engram_compilers.kernels`.
        decode_tokens: token counts compiled with logits for every token, and as numbers of sequences up to 8.
        prefill_tokens: larger token counts, compiled with logits for every token and for the last one only.
        threads: how many run the library unless told otherwise, 0 for one on each core there is (``auto`` in files).
        cache_dtype: what attention's keys and values are kept in, ``float32`` or ``float16``.
        mtriple: LLVM target triple. ``mcpu``: LLVM processor name.
    """

    name: str
    machine: str
    cpu_flags: tuple[str, ...]
    kernels: str
    decode_tokens: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    threads: int
    cache_dtype: str
    mtriple: str
    mcpu: str

    @classmethod
    def from_dict(cls, name: str, raw: dict[str, Any]) -> Self:
        """Check and build; raises TargetError naming the key."""
        try:
            return cls._from_known(name, raw)
        except (KeyError, TypeError) as error:
            raise TargetError(f"profile {name} is malformed: {error!r}") from error

    @classmethod
    def _from_known(cls, name: str, raw: dict[str, Any]) -> Self:
        if raw.keys() != KEYS:
            raise TargetError(f"profile {name} has keys {sorted(raw)}, expected {sorted(KEYS)}")
        if raw["kernels"] not in KERNEL_FAMILIES:
            raise TargetError(f"profile {name} asks for kernels {raw['kernels']!r}, there are {list(KERNEL_FAMILIES)}")
        if raw["cache_dtype"] not in CACHE_DTYPES:
            raise TargetError(f"profile {name} has cache_dtype {raw['cache_dtype']!r}, there are {list(CACHE_DTYPES)}")
        counts = [*raw["decode_tokens"], *raw["prefill_tokens"]]
        if counts[:1] != [1] or any(type(count) is not int for count in counts) or counts != sorted(set(counts)):
            raise TargetError(f"profile {name} compiles token counts {counts}, expected ascending ones from 1")
        return cls(
            name=name,
            machine=raw["machine"],
            cpu_flags=tuple(raw["cpu_flags"]),
            kernels=raw["kernels"],
            decode_tokens=tuple(raw["decode_tokens"]),
            prefill_tokens=tuple(raw["prefill_tokens"]),
            threads=_threads(name, raw["threads"]),
            cache_dtype=raw["cache_dtype"],
            mtriple=raw["llvm"]["mtriple"],
            mcpu=raw["llvm"]["mcpu"],
        )

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """(tokens, rows of logits) of every forward pass that is compiled."""
        every_row = [(count, count) for count in (*self.decode_tokens, *self.prefill_tokens)]
        last_row = [(count, 1) for count in (*self.decode_tokens, *self.prefill_tokens) if count > 1]
        return (*every_row, *last_row)

    @property
    def batches(self) -> tuple[int, ...]:
        """Numbers of sequences, a token of each, whose forward passes are compiled."""
        return tuple(count for count in self.decode_tokens if 1 < count <= MOST_SEQUENCES)

    def fits(self, architecture: str, flags: Iterable[str]) -> bool:
        """Whether a machine with these CPU flags can run the code."""
        return self.machine == architecture and set(self.cpu_flags) <= set(flags)


def _threads(name: str, value: object) -> int:
    if value == AUTO_THREADS:
        return 0
    if type(value) is not int or not 1 <= value <= MOST_THREADS:
        raise TargetError(f"profile {name} has threads {value!r}, expected {AUTO_THREADS!r} or 1 to {MOST_THREADS}")
    return value


def profile_names() -> list[str]:
    """Return the profiles that come with the package."""
    folder = resources.files("engram_targets") / "profiles"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str) -> TargetProfile:
    """Load a profile by name; ``native`` is the one that fits this machine.

    Raises:
        TargetError: no such profile, or none fits.
    """
    if name == NATIVE:
        return detect_native(machine(), usable_cpu_flags())
    if name not in profile_names():
        raise TargetError(f"target {name!r} is unknown; there are {[NATIVE, *profile_names()]}")
    text = (resources.files("engram_targets") / "profiles" / f"{name}.toml").read_text(encoding="utf-8")
    return TargetProfile.from_dict(name, tomllib.loads(text))


def detect_native(architecture: str, flags: Iterable[str]) -> TargetProfile:
    """Return the profile that asks for most of what a machine has; raises TargetError if none fits."""
    available = set(flags)
    fitting = [profile for name in profile_names() if (profile := load_profile(name)).fits(architecture, available)]
    if not fitting:
        raise TargetError(f"no target profile fits a {architecture} machine; there are {profile_names()}")
    return max(fitting, key=lambda profile: len(profile.cpu_flags))
