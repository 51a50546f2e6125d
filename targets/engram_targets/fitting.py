"""Whether this machine can run what is compiled for a target, and what that needs."""

import ctypes.util
from collections.abc import Iterable
from dataclasses import dataclass

from engram_runtime.cpu import machine, usable_cpu_flags
from engram_targets.common import Profile
from engram_targets.cpu import CpuProfile
from engram_targets.gpu import GpuProfile
from engram_targets.npu import NpuProfile

OPENCL, OPENCL_DRIVER = "opencl", "OpenCL"  # the language that there is an executor for, and its driver's library
COMPILE = "pip install 'engram-edge[compile]'"
RUN = "Python with numpy, apache-tvm-ffi, tokenizers, click and jinja2"


@dataclass(frozen=True, slots=True)
class Needs:
    """What it takes to compile for a target and to run what came of it, a line of text each."""

    compile: str
    run: str


def misfit(profile: Profile) -> str | None:
    """Return why code for a target can't run on this machine, None where nothing is known against it."""
    match profile:
        case CpuProfile():
            return cpu_misfit(profile, machine(), usable_cpu_flags())
        case NpuProfile():
            return cpu_misfit(profile.host, machine(), usable_cpu_flags())
        case GpuProfile():
            return gpu_misfit(profile.language)
    return None


def cpu_misfit(profile: CpuProfile, architecture: str, flags: Iterable[str]) -> str | None:
    """Return why a processor with these flags can't run code for a profile, None where it can."""
    if profile.machine != architecture:
        return f"it is for {profile.machine}, this machine is {architecture}"
    missing = sorted(set(profile.cpu_flags) - set(flags))
    return f"this machine lacks CPU features {missing}" if missing else None


def gpu_misfit(language: str) -> str | None:
    """Return why code in a language of graphics processors can't run here, None where there is a driver for it."""
    if language != OPENCL:
        return f"there is no executor for {language}: its kernels are generated, and nothing here runs them"
    return None if ctypes.util.find_library(OPENCL_DRIVER) else f"there is no driver, a library {OPENCL_DRIVER}"


def needs(profile: Profile) -> Needs:
    """Return what a target takes."""
    match profile:
        case CpuProfile():
            return Needs(_to_compile(profile), _to_run(profile))
        case NpuProfile():
            host = needs(profile.host)
            return Needs(host.compile, f"{host.run}; the array is simulated")
        case GpuProfile():
            checked = {"cuda": ", nvcc to check the code", "opencl": "", "metal": ""}[profile.language]
            run = {"opencl": f"an OpenCL driver, pyopencl, {RUN}"}.get(
                profile.language, "an executor, which there isn't yet"
            )
            return Needs(f"{COMPILE}{checked}", run)
    return Needs(COMPILE, "a C compiler and libc, no Python")


def _to_compile(profile: CpuProfile) -> str:
    if (profile.machine, profile.system) == (machine(), "linux"):
        return f"{COMPILE}, and gcc, clang or ziglang to link"
    return f"{COMPILE} and ziglang to link"


def _to_run(profile: CpuProfile) -> str:
    flags = f" and CPU features {' '.join(profile.cpu_flags)}" if profile.cpu_flags else ""
    return f"{profile.machine} with {profile.system}{flags}; {RUN}"
