"""Whether a compiler takes generated source: nvcc for CUDA, where it is installed."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from engram_runtime.errors import CompileError
from engram_targets.gpu import CUDA, GpuProfile

NVCC_FOLDER = "/usr/local/cuda/bin"  # where its installer puts it, on the PATH or not
NVCC_OPTIONS = ("-ptx", "--fmad=false", "--disable-warnings")  # products and sums stay apart where kernels have them so


def nvcc() -> str | None:
    """Return the path of NVIDIA's compiler, or None where it isn't installed."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=NVCC_FOLDER)


def check_source(source: Path, profile: GpuProfile, report: Callable[[str], None]) -> None:
    """Have CUDA C++ compiled; raises CompileError where nvcc refuses it.

    OpenCL C is compiled by each device's driver when it is loaded. There is nothing to check Metal with.
    """
    if profile.language != CUDA:
        return
    compiler = nvcc()
    if compiler is None:
        report("leaving the source unchecked: nvcc isn't installed")
        return
    report(f"checking the source by {compiler}")
    command = [compiler, f"-arch={profile.arch}", *NVCC_OPTIONS, "-o", os.devnull, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"nvcc refuses the kernels of {profile.name}: {(done.stdout + done.stderr).strip()[:500]}")
