"""What LLVM may use for the processor of a profile, and what the profile asks of a machine."""

import pytest
import tvm

from engram_targets import cpu_profile_names, load_cpu_profile

# LLVM's names of the x86 features it uses unasked, as /proc/cpuinfo spells them. What else it reports is in all x86-64
# processors, tunes, or is used by intrinsics alone that no kernel calls.
USED = {
    "avx": "avx",
    "avx2": "avx2",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512f": "avx512f",
    "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "cx16": "cx16",
    "f16c": "f16c",
    "fma": "fma",
    "gfni": "gfni",
    "lzcnt": "abm",
    "movbe": "movbe",
    "popcnt": "popcnt",
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "ssse3": "ssse3",
}
TILES = {"amx-tile": "amx_tile", "amx-int8": "amx_int8"}  # asked for by the kernels of amx


@pytest.mark.parametrize("name", [name for name in cpu_profile_names() if name.startswith("x86")])
def test_a_profile_asks_for_all_that_llvm_uses_unasked(name: str) -> None:
    profile = load_cpu_profile(name)
    target = tvm.target.Target(profile.llvm.target)
    features = tvm.target.codegen.llvm_get_cpu_features(target)
    asked = {**USED, **(TILES if profile.kernels == "amx" else {})}
    assert set(profile.cpu_flags) == {flag for feature, flag in asked.items() if feature in features}
