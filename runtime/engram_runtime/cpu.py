"""What this machine's processor can do and its memory holds, read from the operating system, never from model names."""

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
FLAG_KEYS = ("flags", "Features")  # as x86 and Arm kernels spell it
EXTENSIONS_KEY = "isa"  # as RISC-V kernels spell it
NAME_KEY = "model name"
TILE_FLAGS = frozenset({"amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "amx_complex"})

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux's Documentation/arch/x86/xstate.rst


def cpu_flags() -> frozenset[str]:
    """Return the CPU feature flags the kernel reports; empty where it reports none.

    Those of RISC-V are its extensions: the letters of ``rv64imafdcv_zicsr_..`` and the words after it.
    """
    if not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in FLAG_KEYS:
            return frozenset(value.split())
        if key.strip() == EXTENSIONS_KEY:
            letters, *words = value.strip().split("_")
            return frozenset((*letters.removeprefix("rv64").removeprefix("rv32"), *words))
    return frozenset()


def cpu_name() -> str:
    """Return what the kernel calls the processor, or the architecture where it has no name for it, as on Arm."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    facts = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in facts if key.strip() == NAME_KEY), machine())


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


def available_cores() -> int:
    """Return how many physical cores this process may keep busy: those of its CPUs, within its CPU quota."""
    return max(1, math.floor(min(allowed_cores(), cpu_quota())))


def allowed_cores() -> int:
    """Return on how many physical cores the CPUs lie that this process may use."""
    return len({_core(cpu) for cpu in available_cpus()})


def _core(cpu: int) -> str:
    """Name a CPU's core by the CPUs that share it, or by the CPU itself where the system doesn't tell."""
    siblings = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return siblings.read_text().strip() if siblings.exists() else str(cpu)


def cpu_quota() -> float:
    """Return how many CPUs' time this process's control groups grant it, infinity where they set no limit."""
    return min((_quota(folder) for folder in control_groups("cpu")), default=math.inf)


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups with a say in ``cpu``, ``memory``, .. and of all above them."""
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = CGROUPS / controller if controllers else CGROUPS
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _quota(group: Path) -> float:
    unified, quota, period = (group / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    if unified.exists():
        limit = unified.read_text().split()
    elif quota.exists():
        limit = [quota.read_text(), period.read_text()]
    else:
        return math.inf
    return math.inf if limit[0].strip() in ("max", "-1") else int(limit[0]) / int(limit[1])
