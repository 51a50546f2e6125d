"""What this machine's processor can do and its memory holds, read from the operating system, never from model names."""

import ctypes
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
FLAG_KEYS = ("flags", "Features")  # as x86 and Arm kernels spell it
TILE_FLAGS = frozenset({"amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "amx_complex"})

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux's Documentation/arch/x86/xstate.rst


def cpu_flags() -> frozenset[str]:
    """Return the CPU feature flags the kernel reports; empty where it reports none."""
    if not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in FLAG_KEYS:
            return frozenset(value.split())
    return frozenset()


def usable_cpu_flags() -> frozenset[str]:
    """Return `cpu_flags` without those of AMX where the kernel keeps tiles from this process."""
    flags = cpu_flags()
    return flags if "amx_tile" not in flags or request_tiles() else flags - TILE_FLAGS


def request_tiles() -> bool:
    """Ask the kernel to let this process use AMX tiles; without its leave the first tile instruction ends the process.

    The answer holds for all threads and is the same at every call.
    """
    return system_call(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def system_call(number: int, *arguments: int) -> int:
    """Make an x86-64 Linux system call; returns -1 where it fails."""
    return int(ctypes.CDLL(None).syscall(number, *map(ctypes.c_long, arguments)))


def machine() -> str:
    """Return the instruction set architecture, e.g. ``x86_64`` or ``aarch64``."""
    return platform.machine()


def physical_memory() -> int:
    """Return the bytes of memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_cpus() -> list[int]:
    """Return the ids of the CPUs this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
