"""Whether LLVM knows what a profile names: it would compile for a generic processor instead, and say so in passing."""

import tvm
from tvm.target import codegen

from engram_runtime.errors import CompileError
from engram_targets import CpuProfile, Llvm

ALIASES = {"arm64": "aarch64"}  # of architectures
GENERIC = "generic"  # what LLVM takes in place of a processor it doesn't know


def check_processor(profile: CpuProfile) -> None:
    """Refuse names that LLVM doesn't know; raises CompileError for an architecture, a processor or a feature."""
    llvm = profile.llvm
    architecture = llvm.mtriple.partition("-")[0]
    if ALIASES.get(architecture, architecture) not in map(str, codegen.llvm_get_targets()):
        raise CompileError(
            f"profile {profile.name} has mtriple {llvm.mtriple!r}, LLVM makes no code for {architecture}; name another"
        )
    if not _knows_processor(llvm):
        raise CompileError(
            f"profile {profile.name} has mcpu {llvm.mcpu!r}, which LLVM doesn't know for {architecture}; name one of "
            f"those that clang --target={llvm.mtriple} --print-supported-cpus lists"
        )
    for feature in llvm.mattr:
        if feature[:1] not in ("+", "-") or feature[1:] not in _features(llvm.mtriple, llvm.mcpu, f"+{feature[1:]}"):
            raise CompileError(
                f"profile {profile.name} has mattr {feature!r}, expected + or - and a feature that LLVM knows for "
                f"{architecture}"
            )


def _knows_processor(llvm: Llvm) -> bool:
    """Whether a processor is among those that LLVM lists, or another name of one, with features of its own."""
    listed = codegen.llvm_get_cpu_archlist(_target(llvm.mtriple, GENERIC))
    return llvm.mcpu in map(str, listed) or _features(llvm.mtriple, llvm.mcpu) != _features(llvm.mtriple, GENERIC)


def _features(mtriple: str, mcpu: str, *mattr: str) -> set[str]:
    return set(map(str, codegen.llvm_get_cpu_features(_target(mtriple, mcpu, *mattr))))


def _target(mtriple: str, mcpu: str, *mattr: str) -> tvm.target.Target:
    attributes = {"mattr": list(mattr)} if mattr else {}
    return tvm.target.Target({"kind": "llvm", "mtriple": mtriple, "mcpu": mcpu, **attributes})
