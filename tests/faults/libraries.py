"""C10: libraries for processors, machines and versions that aren't these."""

import platform
import random
import tempfile
from pathlib import Path
from unittest import mock

from tests.faults.row import Outcome, Row
from tests.test_profiles import bundle_at, raw_library

from engram_runtime import Bundle, cpu
from engram_runtime.errors import TargetError
from engram_runtime.library import LibraryInfo, installed_ffi
from engram_runtime.trust import library as trust_library
from engram_runtime.trust.library import trusted_library
from engram_runtime.trust.records import TRUSTED, keep_record
from engram_targets import CpuProfile, load_profile, profile_names

X86_64, AARCH64, RISCV64 = "x86_64", "aarch64", "riscv64"
V2 = "pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm"
V3 = f"{V2} avx avx2 fma f16c bmi1 bmi2 abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
# What Linux says of processors.
BOXES = {
    "Core 2": (X86_64, "flags", "pni ssse3 cx16 lahf_lm"),
    "Nehalem": (X86_64, "flags", V2),
    "Haswell": (X86_64, "flags", V3),
    "Skylake-SP": (X86_64, "flags", V4),
    "Cascade Lake": (X86_64, "flags", f"{V4} avx512_vnni"),
    "Alder Lake": (X86_64, "flags", f"{V3} avx_vnni gfni"),
    "Cortex-A72": (AARCH64, "Features", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "Cortex-A76": (AARCH64, "Features", "fp asimd aes atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"),
    "Neoverse V1": (AARCH64, "Features", "fp asimd atomics fphp asimdhp asimdrdm asimddp asimdfhm i8mm bf16 sve"),
    "SpacemiT K1": (RISCV64, "isa", "rv64imafdcv_zicsr_zifencei"),
    "nothing told": (X86_64, "bugs", ""),
}
EXTENSIONS = {"SpacemiT K1": frozenset("imafdcv") | {"zicsr", "zifencei"}}  # what features mean that aren't words
OTHER_FFI = "0.0.1"


def cpu_profiles() -> list[CpuProfile]:
    """Return the profiles of processors."""
    profiles = (load_profile(name) for name in profile_names())
    return [profile for profile in profiles if isinstance(profile, CpuProfile)]


def wrong_processors(count: int) -> Outcome:
    """Ask for libraries of all targets on all boxes, of two versions of tvm-ffi; none is loaded that doesn't fit."""
    cases = [(profile, box, ffi) for profile in cpu_profiles() for box in BOXES for ffi in (installed_ffi(), OTHER_FFI)]
    failures = []
    for profile, box, ffi in random.Random("C10").sample(cases, min(count, len(cases))):
        with tempfile.TemporaryDirectory() as folder:
            failures += refused_or_fits(Path(folder), profile, box, ffi or OTHER_FFI)
    tried = min(count, len(cases))
    return Outcome(
        tried=tried,
        survived=tried - len(failures),
        figure=f"{len(cpu_profiles())} targets on {len(BOXES)} boxes",
        failures=tuple(failures[:10]),
    )


def refused_or_fits(folder: Path, profile: CpuProfile, box: str, ffi: str) -> list[str]:
    """Return what went wrong: a library that fits is found, another one refused before anything is loaded."""
    machine, key, features = BOXES[box]
    (folder / "cpuinfo").write_text(f"processor : 0\n{key} : {features}\n")
    raw = raw_library(target=profile.name, machine=profile.machine, cpu_flags=list(profile.cpu_flags), ffi=ffi)
    info = LibraryInfo.from_dict(raw)
    place = folder / "lib" / profile.name
    place.mkdir(parents=True)
    (place / "compile.json").write_bytes(info.to_bytes())
    keep_record(info, TRUSTED, place)
    with (
        mock.patch.object(cpu, "CPUINFO", folder / "cpuinfo"),
        mock.patch.object(platform, "machine", return_value=machine),
    ):
        told = EXTENSIONS.get(box, frozenset(features.split()))
        fits = machine == profile.machine and told.issuperset(profile.cpu_flags) and ffi == installed_ffi()
        said = what_is_said(bundle_at(folder))
    if (said is None) != fits:
        return [f"{profile.name} on {box}, ffi {ffi}: {said}"]
    return []


def what_is_said(bundle: Bundle) -> str | None:
    """Return why no library may be loaded, None where one may; it would be tried in a process of its own then."""
    with mock.patch.object(trust_library, "require_trial", return_value=None):
        try:
            trusted_library(bundle)
        except TargetError as error:
            return str(error)
    return None


ROWS = (
    Row(
        name="C10",
        fault="a library for another processor, machine or version of tvm-ffi",
        expected="refused before anything is loaded, what fits is found",
        quick=242,
        full=10_000,
        run=wrong_processors,
    ),
)
