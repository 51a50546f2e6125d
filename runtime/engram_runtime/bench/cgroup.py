"""A control group whose processes may hold only so much memory, the pages of files they read included."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_runtime.cpu import control_groups
from engram_runtime.errors import TargetError

# Of each version of control groups: what sets the limit, and what is 0 so that swap is no way around it.
CONTROLS = (("memory.max", "memory.swap.max"), ("memory.limit_in_bytes", "memory.swappiness"))
NAME = "engram-bench-{}"
ENTER = 'echo $$ > "$0" && exec "$@"'  # so that a program is in the group before its first page


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group with a limit of memory, by the folder that controls it."""

    folder: Path

    def limit(self, num_bytes: int) -> None:
        """Set the limit.

        Raises:
            TargetError: there is none to set, or the system refuses this one.
        """
        for limit, swap in ((self.folder / name for name in names) for names in CONTROLS):
            if limit.exists():
                _write(limit, num_bytes)
                if swap.exists():  # it may be compiled out
                    _write(swap, 0)
                return
        raise TargetError(
            f"control groups below {self.folder.parent} can't limit memory; enable the memory controller there"
        )

    def command(self, line: Sequence[str]) -> list[str]:
        """Return the command that runs ``line`` inside the group."""
        return ["/bin/sh", "-c", ENTER, str(self.folder / "cgroup.procs"), *line]


def _write(file: Path, value: int) -> None:
    try:
        file.write_text(str(value))
    except OSError as error:
        raise TargetError(f"{file} can't be set to {value}: {error.strerror}; run as root") from error


@contextlib.contextmanager
def memory_group(name: str, num_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group below this process's own with a limit, and remove it; its processes must have ended by then.

    Args:
        name: tells groups of one parent apart.
        num_bytes: what its processes may hold.

    Raises:
        TargetError: this process may not make one, or memory is not among what it may control.
    """
    parent = next(control_groups("memory"), None)
    if parent is None:
        raise TargetError("this system has no control groups of memory; measure without a cap")
    group = MemoryGroup(parent / NAME.format(name))
    try:
        group.folder.mkdir()
    except OSError as error:
        raise TargetError(f"a control group below {parent} can't be made: {error.strerror}; run as root") from error
    try:
        group.limit(num_bytes)
        yield group
    finally:
        group.folder.rmdir()
