"""B1: exports that are killed at any moment."""

import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from tests.faults.row import Outcome, Row
from tests.faults.warm import WarmExport, contents, ended, fork, killed, warm_export, whole

TIMED = 5  # exports that nobody disturbs: of one alone, the first, kills came too late in two of five
FINISHED_EVERY = 4  # so many kills, one after the other, are made good by an export that is left alone


def kills_of_exports(count: int) -> Outcome:
    """Kill exports to a new place."""
    return _kill_exports("B1 new", count, replace=False)


def kills_of_replacements(count: int) -> Outcome:
    """Kill exports that replace a bundle."""
    return _kill_exports("B1 replace", count, replace=True)


def _kill_exports(name: str, count: int, *, replace: bool) -> Outcome:
    rng = random.Random(name)
    root = Path(tempfile.mkdtemp())
    warm = warm_export(root)
    place = root / "place"
    place.mkdir()
    failures: list[str] = []
    killed_so_far = number = 0
    duration = statistics.median(_duration(warm, root / f"timed-{number}") for number in range(TIMED))
    while killed_so_far < count:
        delay = rng.uniform(0, 1.2 * duration)
        killed_so_far += _kill_one(warm, place / "out", delay, replace=replace)
        found = _wrong(warm, place / "out", replace=replace)
        if not found and number % FINISHED_EVERY == FINISHED_EVERY - 1:
            found = _finish(warm, place / "out")
        if found:
            failures.append(f"kill {number} after {delay * 1e3:.1f} ms: {found}")
            shutil.rmtree(place)
            place.mkdir()
        number += 1
    figure = f"{count} killed, {number - count} ended before that, over {1.2 * duration * 1e3:.0f} ms"
    return Outcome(tried=number, survived=number - len(failures), figure=figure, failures=tuple(failures[:5]))


def _duration(warm: WarmExport, out: Path) -> float:
    started = time.monotonic()
    if ended(fork(lambda: warm.run(out, replace=False))) != 0:
        raise RuntimeError("an export that nobody disturbs fails")
    return time.monotonic() - started


def _kill_one(warm: WarmExport, out: Path, delay: float, *, replace: bool) -> bool:
    """Kill an export so long after its start; returns whether it was still running."""
    if replace and not out.exists():
        shutil.copytree(warm.old, out)
    elif not replace:
        shutil.rmtree(out, ignore_errors=True)
    process = fork(lambda: warm.run(out, replace=replace))
    time.sleep(delay)
    return killed(process) < 0


def _wrong(warm: WarmExport, out: Path, *, replace: bool) -> str:
    """Say what is wrong after a kill: a new place holds nothing or all of it, a replaced one the old or the new."""
    if not out.exists():
        return "nothing is there any more" if replace else ""
    return whole(out, warm.new, contents(warm.old)) if replace else whole(out, warm.new)


def _finish(warm: WarmExport, out: Path) -> str:
    """Export once more, undisturbed, and say what is wrong then; nothing may lie beside the bundle."""
    if (code := ended(fork(lambda: warm.run(out, replace=True)))) != 0:
        return f"the next export ends with exit code {code}"
    if beside := sorted(path.name for path in out.parent.iterdir() if path != out):
        return f"left beside the bundle by the next export: {beside}"
    found = whole(out, warm.new)
    shutil.rmtree(out)
    return found


ROWS = (
    Row(
        name="B1",
        fault="kill -9 during an export to a new place",
        expected="nothing there or all of it; the next export succeeds and leaves nothing else",
        quick=200,
        full=5000,
        run=kills_of_exports,
    ),
    Row(
        name="B1 replace",
        fault="kill -9 during an export in place of a bundle",
        expected="the old bundle or the new one, whole; the next export succeeds and leaves nothing else",
        quick=20,
        full=5000,
        run=kills_of_replacements,
    ),
)
