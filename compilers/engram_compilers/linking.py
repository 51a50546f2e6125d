"""Link object files with threads and scratch memory: by the system's C compiler, else by the one of ziglang.

ziglang brings a linker, the C library's headers and stubs of its symbols for every system it links for, so another
machine's library needs nothing of that machine.
"""

import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_ffi import libinfo

from engram_runtime.cpu import machine
from engram_runtime.doctor.install import system_compiler
from engram_runtime.errors import CompileError

GLIBC = "2.28"  # of 2018: what is linked for another machine runs with that and newer ones, as TVM's own wheels do
NO_DEBUG = "-Wl,-S"  # what LLVM says of variables is a third of a library, and there is no source to show them in
MACHINES = {"arm64": "aarch64"}  # as ziglang calls them


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How libraries of an operating system are linked.

    Attributes:
        name: as target profiles call it. ``own``: as `platform.system` does.
        library: name of a compiled library.
        sources: C files beside this one, which every library is linked with.
        options: of the linker.
    """

    name: str
    own: str
    library: str
    sources: tuple[str, ...]
    options: tuple[str, ...]


LINUX = System(
    name="linux",
    own="Linux",
    library="model.so",
    sources=("thread_pool.c", "scratch_memory.c"),
    options=("-shared", "-fPIC", "-pthread"),
)
MACOS = System(
    name="macos",
    own="Darwin",
    library="model.dylib",
    sources=LINUX.sources,
    options=("-shared", "-fPIC", "-pthread", "-Wl,-undefined,dynamic_lookup"),  # TVM's runtime is loaded before it
)
# A module without main; threads and scratch memory are among what it imports from TVM's own runtime for the web.
WASI = System(
    name="wasi",
    own="Wasi",
    library="model.wasm",
    sources=(),
    options=("-mexec-model=reactor", "-Wl,--import-symbols", "-Wl,--export-dynamic"),
)


def system_of(mtriple: str) -> System:
    """Return the operating system an LLVM target triple names; Linux unless it says another one."""
    if mtriple.startswith("wasm32"):
        return WASI
    return MACOS if "-apple-" in mtriple else LINUX


def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, *, mtriple: str) -> None:
    """Link the objects with what their kernels call for threads and memory, as TVM's ``export_library`` asks for it.

    Raises:
        CompileError: there is no linker, or it failed.
    """
    system = system_of(mtriple)
    sources = [str(Path(__file__).with_name(name)) for name in system.sources]
    backend = ["-std=gnu11", "-O2", f"-I{libinfo.find_include_path()}", *sources]
    command = [*linker(mtriple), *system.options, NO_DEBUG, "-o", output, *objects, *backend, *(options or [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{command[0]} failed to link {output}: {done.stderr.strip()[-500:]}")


def linker(mtriple: str) -> list[str]:
    """Return the command that links for a target triple; raises CompileError where there is none."""
    if not links_by_ziglang(mtriple):
        return [str(system_compiler())]
    if importlib.util.find_spec("ziglang") is None:
        raise CompileError(f"no C compiler to link with for {mtriple}: install gcc or clang, or pip install ziglang")
    return [sys.executable, "-P", "-m", "ziglang", "cc", "-target", zig_target(mtriple)]


def links_by_ziglang(mtriple: str) -> bool:
    """Whether a target is another kind of machine than this one, or this one has no C compiler."""
    return not is_own(mtriple) or system_compiler() is None


def is_own(mtriple: str) -> bool:
    """Whether a target triple is of this machine's architecture and operating system."""
    return mtriple.partition("-")[0] == machine() and system_of(mtriple).own == platform.system()


def zig_target(mtriple: str) -> str:
    """Return what ziglang calls an LLVM target triple, with the oldest C library or system it is to run on."""
    architecture = MACHINES.get(mtriple.partition("-")[0], mtriple.partition("-")[0])
    match system_of(mtriple):
        case system if system is WASI:
            return f"{architecture}-wasi"
        case system if system is MACOS:
            version = re.search(r"macosx?(\d+)", mtriple)
            return f"{architecture}-macos{f'.{version[1]}.0' if version else ''}"
        case _:
            return f"{mtriple}.{GLIBC}" if mtriple.endswith("-gnu") else mtriple
