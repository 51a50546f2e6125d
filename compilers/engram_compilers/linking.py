"""Link object files with threads and scratch memory: by the system's C compiler, else by the one of ziglang."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tvm_ffi import libinfo

from engram_runtime.cpu import machine
from engram_runtime.doctor.install import system_compiler
from engram_runtime.errors import CompileError

BACKEND = tuple(str(Path(__file__).with_name(name)) for name in ("thread_pool.c", "scratch_memory.c"))


def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, *, mtriple: str) -> None:
    """Link the objects with what their kernels call for threads and memory, as TVM's ``export_library`` asks for it.

    Raises:
        CompileError: there is no linker, or it failed.
    """
    backend = ["-std=gnu11", "-O2", "-pthread", f"-I{libinfo.find_include_path()}", *BACKEND]
    command = [*linker(mtriple), "-shared", "-fPIC", "-o", output, *objects, *backend, *(options or [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{command[0]} failed to link {output}: {done.stderr.strip()[-500:]}")


def linker(mtriple: str) -> list[str]:
    """Return the command that links for a target triple; raises CompileError where there is none."""
    if mtriple.partition("-")[0] == machine() and (path := system_compiler()):
        return [path]
    if importlib.util.find_spec("ziglang") is None:
        raise CompileError(f"no C compiler to link with for {mtriple}: install gcc or clang, or pip install ziglang")
    return [sys.executable, "-m", "ziglang", "cc", "-target", mtriple]
