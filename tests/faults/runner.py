"""Run rows in processes of their own, so that a row that crashes or hangs is a figure and not the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.row import Row
from tests.faults.rows import Placed

AT_ONCE = 2  # CI has two cores
LAST_LINES = 12  # of what a row that ended badly has said
LEFT_TO_FULL = "takes long, so make faults-full has it"  # of rows that make 0 faults in the quick tier
OWN_FOLDERS = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "TMPDIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A line of the table.

    Attributes:
        name, fault, expected: the row's.
        tried, survived, figure, failures: its outcome's. A row that crashed, hung or raised survived nothing.
        reason: why it can't run on this machine; empty where it ran.
        seconds: it took, by the clock.
        cpu_s: seconds of a core that it and its children took, 0 where it ended badly.
    """

    name: str
    fault: str
    expected: str
    tried: int
    survived: int
    figure: str
    failures: tuple[str, ...]
    reason: str
    seconds: float
    cpu_s: float

    @property
    def passed(self) -> bool:
        """Whether all was survived, or nothing could be tried."""
        return self.survived == self.tried and (self.tried > 0 or bool(self.reason))


def run_rows(
    rows: Sequence[Placed], count_of: Callable[[Row], int], limit_s: float, show: Callable[[Result], None]
) -> list[Result]:
    """Run rows, `AT_ONCE` at a time, and return their results in order; ``show`` gets each when it is known.

    The first rows compute, the last ones wait as well: begun from both ends, mostly one of each runs.
    """
    with running_folder() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        living: set[int] = set()

        def run_one(placed: Placed) -> Result:
            count = count_of(placed.row)
            left = replace(line(placed.row, 0), reason=LEFT_TO_FULL)
            result = run_row(placed, count, limit_s, folder, living) if count else left
            show(result)
            return result

        try:
            order = from_both_ends(len(rows))
            found = dict(zip(order, pool.map(run_one, (rows[place] for place in order)), strict=True))
            return [found[place] for place in range(len(rows))]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for group in tuple(living):
                kill_group(group)
            raise


def from_both_ends(count: int) -> list[int]:
    """Return the numbers below ``count``, from the first and from the last one in turn."""
    return [place // 2 if place % 2 == 0 else count - 1 - place // 2 for place in range(count)]


@contextlib.contextmanager
def running_folder() -> Iterator[Path]:
    """Give a folder for everything rows write; what they leave behind, readable or not, goes with it."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def run_row(placed: Placed, count: int, limit_s: float, folder: Path, living: set[int]) -> Result:
    """Run one row.

    Args:
        placed: the row.
        count: faults to make.
        limit_s: seconds after which it counts as hanging and is killed with all it has started.
        folder: for what it writes.
        living: groups of processes that run, for who has to end them.
    """
    begin = time.monotonic()
    own = Path(tempfile.mkdtemp(dir=folder))
    written, log = own / "outcome.json", own / "log"
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.faults.child"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*command, placed.module, placed.row.name, str(count), str(written)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(own),
            process_group=0,
        )
    living.add(child.pid)
    ended = how_it_ended(child, limit_s)
    living.discard(child.pid)
    result = replace(line(placed.row, count), seconds=time.monotonic() - begin)
    if ended:
        return replace(result, failures=(f"{ended}; its last lines:\n{last_lines(log)}",))
    outcome = json.loads(written.read_text(encoding="utf-8"))
    if "reason" in outcome:
        return replace(result, tried=0, **outcome)
    return replace(result, **outcome | {"failures": tuple(outcome["failures"])})


def line(row: Row, count: int) -> Result:
    """Return the result of a row of which nothing survived."""
    return Result(
        name=row.name,
        fault=row.fault,
        expected=row.expected,
        tried=count,
        survived=0,
        figure="",
        failures=(),
        reason="",
        seconds=0,
        cpu_s=0,
    )


def how_it_ended(child: subprocess.Popen[bytes], limit_s: float) -> str:
    """Wait for a row and return what was wrong with its end, nothing if it was good; no process of it stays."""
    try:
        code = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        kill_group(child.pid)
        child.wait()
        return f"hung: killed after {limit_s:.0f} s"
    kill_group(child.pid)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else ""


def kill_group(group: int) -> None:
    """End a row's processes, if there are any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a row: what it writes for its user lies in a folder of its own."""
    folders = {name: folder / name.lower() for name in OWN_FOLDERS}
    for each in folders.values():
        each.mkdir(mode=0o700)
    return os.environ | {name: str(each) for name, each in folders.items()}


def last_lines(log: Path) -> str:
    """Return the end of what a row has said."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
