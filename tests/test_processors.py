"""What LLVM doesn't know is refused: it would compile for another processor, or end the process."""

import dataclasses
from typing import Any

import pytest

from engram_compilers.processors import check_processor
from engram_runtime.errors import CompileError
from engram_targets import cpu_profile_names, load_cpu_profile


@pytest.mark.parametrize("name", cpu_profile_names())
def test_llvm_knows_what_profiles_name(name: str) -> None:
    check_processor(load_cpu_profile(name))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "aarch64-dotprod",
            {"mcpu": "cortex-a99"},
            "profile aarch64-dotprod has mcpu 'cortex-a99', which LLVM doesn't know for aarch64; name one of those "
            "that clang --target=aarch64-linux-gnu --print-supported-cpus lists",
        ),
        (
            "x86-64-v3",
            {"mtriple": "sparq-linux-gnu"},
            "profile x86-64-v3 has mtriple 'sparq-linux-gnu', LLVM makes no code for sparq; name another",
        ),
        (
            "riscv64-rvv",
            {"mattr": ("+v", "+w")},
            "profile riscv64-rvv has mattr '+w', expected + or - and a feature that LLVM knows for riscv64",
        ),
        (
            "aarch64-i8mm-sve",
            {"mattr": ("sha3",)},
            "profile aarch64-i8mm-sve has mattr 'sha3', expected + or - and a feature that LLVM knows for aarch64",
        ),
    ],
)
def test_what_llvm_does_not_know_is_refused(name: str, changes: dict[str, Any], expected: str) -> None:
    profile = load_cpu_profile(name)
    profile = dataclasses.replace(profile, llvm=dataclasses.replace(profile.llvm, **changes))
    with pytest.raises(CompileError) as caught:
        check_processor(profile)
    assert str(caught.value) == expected


def test_another_name_of_a_processor_is_known() -> None:
    profile = load_cpu_profile("aarch64-i8mm")
    check_processor(dataclasses.replace(profile, llvm=dataclasses.replace(profile.llvm, mcpu="apple-m2")))
