"""Target profiles: what a kind of machine is, as data."""

from engram_targets.common import Profile
from engram_targets.cpu import CpuProfile, Llvm
from engram_targets.gpu import GpuProfile
from engram_targets.npu import NpuProfile
from engram_targets.portable_c import CProfile
from engram_targets.profile import (
    cpu_profile_names,
    detect_native,
    load_cpu_profile,
    load_profile,
    parse_profile,
    profile_names,
)

__all__ = [
    "CProfile",
    "CpuProfile",
    "GpuProfile",
    "Llvm",
    "NpuProfile",
    "Profile",
    "cpu_profile_names",
    "detect_native",
    "load_cpu_profile",
    "load_profile",
    "parse_profile",
    "profile_names",
]
