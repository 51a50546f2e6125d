"""How much memory this process may still take, as Linux tells it."""

from dataclasses import dataclass
from pathlib import Path

from engram_runtime.cpu import control_groups

MEMINFO = Path("/proc/meminfo")
NO_LIMIT = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """Bytes to be had without swapping; ``of_group`` where a control group grants less than the machine has."""

    num_bytes: int
    of_group: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupFiles:
    """How a version of control groups names what it tells; ``caches`` are given up when memory is needed."""

    limit: str
    usage: str
    caches: tuple[str, str]


VERSIONS = (
    _GroupFiles(limit="memory.max", usage="memory.current", caches=("inactive_file", "active_file")),
    _GroupFiles(
        limit="memory.limit_in_bytes",
        usage="memory.usage_in_bytes",
        caches=("total_inactive_file", "total_active_file"),  # those of the groups below included
    ),
)


def free_memory() -> FreeMemory:
    """Return the least of what the machine has available and its control groups leave; page cache counts as free."""
    machine = _fields(MEMINFO)["MemAvailable:"] << 10  # it is given in KiB
    group = min((left for folder in control_groups("memory") for left in _left(folder)), default=machine)
    return FreeMemory(num_bytes=max(min(machine, group), 0), of_group=group < machine)


def _left(folder: Path) -> list[int]:
    """Return the bytes a group's limit leaves, nothing where it has none."""
    for files in VERSIONS:
        if (folder / files.limit).exists() and (limit := (folder / files.limit).read_text().strip()) != NO_LIMIT:
            cached = _fields(folder / "memory.stat")
            usage = int((folder / files.usage).read_text()) - sum(cached[name] for name in files.caches)
            return [int(limit) - usage]
    return []


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines ``name number ...``."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}
