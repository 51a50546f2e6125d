"""Checks of the machine, as far as this process may use it."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engram_runtime.cpu import (
    TILE_FLAGS,
    allowed_cores,
    available_cpus,
    cpu_flags,
    cpu_quota,
    machine,
    request_tiles,
    usable_cpu_flags,
)
from engram_runtime.doctor.finding import Finding
from engram_runtime.memory import FreeMemory, free_memory
from engram_runtime.sizes import format_size
from engram_runtime.tables.disk import cache_file

# What the fast kernels are made of, the fastest first, as the kernel spells it; by architecture.
FAST_FLAGS = {
    "x86_64": ("amx_int8", "avx512_vnni", "avx_vnni", "avx2"),
    "aarch64": ("i8mm", "asimddp"),
}
LITTLE_MEMORY_BYTES = 512 << 20  # a model of 135M parameters in int8, its caches and the interpreter
FEW_FILES = 256  # libraries, tables and a server's connections together
PAGE_BYTES = 4096
HUGE_PAGES = "kernel/mm/transparent_hugepage/enabled"  # below /sys
NO_LIMIT = "unlimited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """Where the kernel tells of itself."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


HERE = Roots()


def machine_findings(roots: Roots = HERE) -> Iterator[Finding]:
    """Look at the processor, its threads, memory, limits, pages and the folder for figures of disks."""
    yield processor(machine(), usable_cpu_flags())
    if cpu_flags() & TILE_FLAGS:
        yield tiles(permitted=request_tiles())
    yield threads(len(available_cpus()), os.cpu_count() or 1, allowed_cores(), cpu_quota())
    yield memory(free_memory())
    yield limits(process_limits(roots))
    yield page_size(os.sysconf("SC_PAGE_SIZE"))
    yield huge_pages(roots)
    yield cache_folder()


def processor(architecture: str, flags: frozenset[str]) -> Finding:
    """Check that there are kernels for a processor, and fast ones."""
    if architecture not in FAST_FLAGS:
        return Finding(
            "processor",
            "fail",
            f"{architecture}, compiled libraries are for {' and '.join(FAST_FLAGS)}",
            "run graphs themselves: --executor onnxruntime",
        )
    if found := [flag for flag in FAST_FLAGS[architecture] if flag in flags]:
        return Finding("processor", "ok", f"{architecture} with {', '.join(found)}")
    return Finding(
        "processor",
        "warn",
        f"{architecture} without {', '.join(FAST_FLAGS[architecture])}: the kernels for it are several times slower",
        "in a virtual machine, let the host's processor through (QEMU: -cpu host)",
    )


def tiles(*, permitted: bool) -> Finding:
    """Check that a process on a processor with AMX may use its tiles."""
    if permitted:
        return Finding("AMX tiles", "ok", "this process may use them")
    return Finding(
        "AMX tiles",
        "warn",
        "the kernel keeps them from this process (arch_prctl is denied)",
        "allow arch_prctl in the container's seccomp profile",
    )


def threads(cpus: int, of_machine: int, cores: int, quota: float) -> Finding:
    """Check that no quota takes CPUs away.

    Args:
        cpus: how many this process may use, on so many ``cores``.
        of_machine: how many there are.
        quota: how many CPUs' time control groups grant, infinity where they set no limit.
    """
    used = f"{cpus} of {of_machine} CPUs on {_count(cores, 'core')}"
    if quota >= cores:
        return Finding("threads", "ok", f"{used}, {_count(cores, 'thread')} by default")
    return Finding(
        "threads",
        "warn",
        f"{used}, but the control group grants the time of {quota:g}: {_count(max(1, math.floor(quota)), 'thread')} "
        f"by default",
        "raise the quota (docker: --cpus, systemd: CPUQuota)",
    )


def memory(free: FreeMemory) -> Finding:
    """Check that there is memory for a small model."""
    detail = f"{format_size(free.num_bytes)} available{' in its control group' if free.of_group else ''}"
    if free.num_bytes >= LITTLE_MEMORY_BYTES:
        return Finding("memory", "ok", detail)
    detail += f", small models take {format_size(LITTLE_MEMORY_BYTES)}"
    return Finding("memory", "warn", detail, more_memory(free))


def more_memory(free: FreeMemory) -> str:
    """Say how there would be more memory."""
    return "raise the group's limit (docker: --memory, systemd: MemoryMax)" if free.of_group else "end other programs"


def process_limits(roots: Roots) -> dict[str, float]:
    """Return the soft limits of this process by their name in proc_pid_limits(5), infinity where there is none."""
    lines = (re.split(r" {2,}", line) for line in (roots.proc / "self" / "limits").read_text().splitlines()[1:])
    return {name: math.inf if soft == NO_LIMIT else int(soft) for name, soft, *_ in lines}


def limits(limits: dict[str, float]) -> Finding:
    """Check how many files may be open and how much memory be mapped; nothing here locks memory."""
    files, space, locked = (limits[f"Max {name}"] for name in ("open files", "address space", "locked memory"))
    detail = f"open files {_limit(files)}, address space {_limit_size(space)}, locked memory {_limit_size(locked)}"
    if space < math.inf:
        return Finding("limits", "warn", f"{detail}: weights and tables are mapped", "ulimit -v unlimited")
    if files < FEW_FILES:
        return Finding("limits", "warn", detail, f"ulimit -n {FEW_FILES} or more")
    return Finding("limits", "ok", detail)


def page_size(num_bytes: int) -> Finding:
    """Check that a row that isn't in memory costs a small read."""
    if num_bytes <= PAGE_BYTES:
        return Finding("page size", "ok", format_size(num_bytes))
    return Finding(
        "page size",
        "warn",
        f"{format_size(num_bytes)}, which is what each row that isn't in memory reads",
        f"where tables are larger than memory, boot a kernel with pages of {format_size(PAGE_BYTES)}",
    )


def huge_pages(roots: Roots) -> Finding:
    """Check that tables in memory can be in huge pages, for which they ask."""
    path = roots.sys / HUGE_PAGES
    if not path.exists():
        return Finding("huge pages", "warn", "this kernel has none, which tables in memory ask for")
    chosen = path.read_text().partition("[")[2].partition("]")[0]
    if chosen != "never":
        return Finding("huge pages", "ok", chosen)
    return Finding(
        "huge pages", "warn", "never, though tables in memory ask for them", f"as root: echo madvise > {path}"
    )


def cache_folder() -> Finding:
    """Check that figures of disks can be kept."""
    mend = "set XDG_CACHE_HOME to a folder you may write to"
    try:
        folder = cache_file().parent
    except OSError as error:
        return Finding("cache folder", "warn", f"disks are measured at every start: {error.strerror}", mend)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding("cache folder", "ok", str(folder))
    return Finding("cache folder", "warn", f"disks are measured at every start: {there} can't be written to", mend)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _limit(value: float) -> str:
    return NO_LIMIT if value == math.inf else f"{value:,}"


def _limit_size(value: float) -> str:
    return NO_LIMIT if value == math.inf else format_size(int(value))
