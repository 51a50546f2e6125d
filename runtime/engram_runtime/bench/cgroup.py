"""A control group whose processes may hold only so much memory, the pages of files they read included."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_runtime.cpu import CGROUPS, OWN_CGROUPS
from engram_runtime.errors import TargetError

V1_CONTROLLER = "memory"
NAME = "engram-bench-{}"
ENTER = 'echo $$ > "$0" && exec "$@"'  # so that a program is in the group before its first page


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group with a limit of memory: control files by version of the interface, 1 or 2."""

    folder: Path
    version: int

    def limit(self, num_bytes: int) -> None:
        """Set the limit; swap is no way around it."""
        if self.version == 1:
            self._write("memory.limit_in_bytes", num_bytes)
            self._write("memory.swappiness", 0)
        else:
            self._write("memory.max", num_bytes)
            self._write("memory.swap.max", 0)

    def command(self, line: Sequence[str]) -> list[str]:
        """Return the command that runs ``line`` inside the group."""
        return ["/bin/sh", "-c", ENTER, str(self.folder / "cgroup.procs"), *line]

    def _write(self, name: str, value: int) -> None:
        file = self.folder / name
        if file.exists():  # swap may be compiled out; the limit itself is looked for before
            file.write_text(str(value))


@contextlib.contextmanager
def memory_group(
    name: str, num_bytes: int, *, root: Path = CGROUPS, own_groups: Path = OWN_CGROUPS
) -> Iterator[MemoryGroup]:
    """Make a group below this process's own with a limit, and remove it; its processes must have ended by then.

    Args:
        name: tells groups of one parent apart.
        num_bytes: what its processes may hold.
        root: where control groups are mounted.
        own_groups: lists those of this process.

    Raises:
        TargetError: this process may not make one, or memory is not among what it may control.
    """
    parent, version = _own_group(root, own_groups)
    folder = parent / NAME.format(name)
    try:
        folder.mkdir()
    except OSError as error:
        raise TargetError(f"a control group below {parent} can't be made: {error.strerror}; run as root") from error
    group = MemoryGroup(folder, version)
    try:
        _limit(group, num_bytes)
        yield group
    finally:
        folder.rmdir()


def _own_group(root: Path, own_groups: Path) -> tuple[Path, int]:
    """Return the folder of this process's memory group and the version of its interface."""
    lines = own_groups.read_text().splitlines() if own_groups.exists() else []
    unified = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if V1_CONTROLLER in controllers.split(","):
            return root / V1_CONTROLLER / path.lstrip("/"), 1
        if not controllers:
            unified = root / path.lstrip("/")
    if unified is None:
        raise TargetError("this system has no control groups of memory; measure without a cap")
    return unified, 2


def _limit(group: MemoryGroup, num_bytes: int) -> None:
    limit = group.folder / ("memory.limit_in_bytes" if group.version == 1 else "memory.max")
    if not limit.exists():
        raise TargetError(
            f"control groups below {group.folder.parent} can't limit memory; enable the memory controller there"
        )
    try:
        group.limit(num_bytes)
    except OSError as error:
        raise TargetError(f"{limit} can't be set to {num_bytes}: {error.strerror}; run as root") from error
