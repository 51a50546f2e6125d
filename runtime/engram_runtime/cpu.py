"""What this machine's processor can do and its memory holds, read from the operating system, never from model names."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
FLAG_KEYS = ("flags", "Features")  # as x86 and Arm kernels spell it


def cpu_flags() -> frozenset[str]:
    """Return the CPU feature flags the kernel reports; empty where it reports none."""
    if not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in FLAG_KEYS:
            return frozenset(value.split())
    return frozenset()


def machine() -> str:
    """Return the instruction set architecture, e.g. ``x86_64`` or ``aarch64``."""
    return platform.machine()


def physical_memory() -> int:
    """Return the bytes of memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_cpus() -> list[int]:
    """Return the ids of the CPUs this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
