"""The library that is packed: what was compiled, unless the bundle or the profile have changed since."""

from collections.abc import Callable
from pathlib import Path

from engram_runtime.bundle import Bundle
from engram_runtime.library import (
    LIBRARY_FOLDER,
    LIBRARY_INFO_NAME,
    LIBRARY_INFO_VERSION,
    LibraryInfo,
    graph_digest,
    verify_library,
)
from engram_runtime.strict_json import read_json_object
from engram_runtime.trust.library import required_reason
from engram_targets import CpuProfile


def ready_library(bundle: Bundle, profile: CpuProfile, report: Callable[[str], None]) -> tuple[Path, LibraryInfo]:
    """Return folder and description of a bundle's library for a profile, compiled now where there is no such one.

    Raises:
        CompileError: it must be compiled and can't be.
        TargetError: a library's file is not what was compiled, or it was neither compiled here nor is it trusted:
            boxes are told to trust what is packed.
    """
    folder = bundle.file(LIBRARY_FOLDER) / profile.name
    if (info := current_library(bundle, profile)) is None:
        from engram_compilers.build import compile_bundle

        report(f"compiling for {profile.name}")
        compile_bundle(bundle, profile, report)
        info = LibraryInfo.from_dict(read_json_object(folder / LIBRARY_INFO_NAME))
    verify_library(folder, info)
    required_reason(bundle, folder, info)
    return folder, info


def current_library(bundle: Bundle, profile: CpuProfile) -> LibraryInfo | None:
    """Return what describes a bundle's library for a profile, or None where there is none or an outdated one."""
    path = bundle.file(LIBRARY_FOLDER) / profile.name / LIBRARY_INFO_NAME
    if not path.is_file():
        return None
    raw = read_json_object(path)
    if raw.get("version") != LIBRARY_INFO_VERSION:
        return None
    info = LibraryInfo.from_dict(raw)
    asked = (graph_digest(bundle), profile.machine, profile.cpu_flags, profile.passes, profile.batches, profile.threads)
    made = (info.graph_sha256, info.machine, info.cpu_flags, info.passes, info.batches, info.threads)
    return info if made == asked else None
