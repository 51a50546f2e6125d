"""Link object files to a shared library: by the system's C compiler, else by the one the package ziglang brings."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence

from engram_runtime.errors import CompileError

SYSTEM_COMPILERS = ("cc", "gcc", "clang")


def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
    """Link, as TVM's ``export_library`` asks for it.

    Raises:
        CompileError: there is no linker, or it failed.
    """
    command = [*linker(), "-shared", "-fPIC", "-o", output, *objects, *(options or [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{command[0]} failed to link {output}: {done.stderr.strip()[-500:]}")


def linker() -> list[str]:
    """Return the command that links; raises CompileError where there is none."""
    for name in SYSTEM_COMPILERS:
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang") is None:
        raise CompileError("no C compiler to link with: install gcc or clang, or pip install ziglang")
    return [sys.executable, "-m", "ziglang", "cc"]
