"""A control group of this machine's kernel that bounds the memory of the processes in it."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.row import CannotRun

ROOT = Path("/sys/fs/cgroup")
ADVICE = "run as root in a control group that may be divided, as by systemd-run --property=Delegate=yes"


class ControlGroup:
    """A group that has been made; see `memory_group`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, pid: int) -> None:
        """Have a process in the group, and what it starts; what it has used before isn't counted by version 1."""
        (self._folder / "cgroup.procs").write_text(str(pid), encoding="ascii")


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[ControlGroup]:
    """Make a group whose processes have so many bytes together, swap included; they must have ended with the block.

    Raises:
        CannotRun: no such group can be made here.
    """
    parent, limit, more = _place()
    folder = parent / f"engram-faults-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
        try:
            (folder / limit).write_text(str(limit_bytes), encoding="ascii")
            with contextlib.suppress(OSError):  # a kernel that doesn't count swap
                (folder / more[0]).write_text(more[1] or str(limit_bytes), encoding="ascii")
            yield ControlGroup(folder)
        finally:
            _remove(folder)
    except OSError as error:
        raise CannotRun(f"no control group can be made in {parent} ({error.strerror}); {ADVICE}") from error


def _place() -> tuple[Path, str, tuple[str, str]]:
    """Return the folder of this process's group, the name of the limit, and name and value of that with swap."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            named = ("memory.memsw.limit_in_bytes", "")
            return ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes", named
    for _, controllers, path in lines:
        if not controllers:
            return ROOT / path.lstrip("/"), "memory.max", ("memory.swap.max", "0")
    raise CannotRun(f"this process is in no control group; {ADVICE}")


def _remove(folder: Path) -> None:
    """Remove a group, whose last process may take a moment to be gone."""
    until = time.monotonic() + 5
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
