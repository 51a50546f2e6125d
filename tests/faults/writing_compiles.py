"""B1: compilations that are killed at any moment."""

import random
import shutil
import tempfile
import time
from pathlib import Path

from tests.faults.row import Outcome, Row
from tests.faults.warm import WarmCompile, contents, ended, fork, killed, warm_compile, write_folder

from engram_runtime.library import LIBRARY_FOLDER

FINISHED_EVERY = 10


def kills_of_compilations(count: int) -> Outcome:
    """Kill compilations, every other one in place of a library."""
    rng = random.Random("B1 compile")
    root = Path(tempfile.mkdtemp())
    warm = warm_compile(root)
    bundle = root / "bundle"
    write_folder(bundle, contents(warm.bundle))
    library = bundle / LIBRARY_FOLDER / warm.target
    started = time.monotonic()
    found = _finish(warm, bundle)
    longest = 1.1 * (time.monotonic() - started)
    failures = [f"undisturbed: {found}"] if found else []
    killed_so_far = number = 0
    while killed_so_far < count:
        shutil.rmtree(library, ignore_errors=True)
        if number % 2:
            write_folder(library, warm.old)
        process = fork(lambda: warm.run(bundle))
        time.sleep(delay := rng.uniform(0, longest))
        killed_so_far += killed(process) < 0
        found = wrong(warm, library, *([warm.old] if number % 2 else [{}]))
        if not found and number % FINISHED_EVERY == FINISHED_EVERY - 1:
            found = _finish(warm, bundle)
        if found:
            failures.append(f"kill {number} after {delay:.3f} s: {found}")
        number += 1
    figure = f"{count} killed, {number - count} ended before that, over {longest:.1f} s"
    return Outcome(tried=number, survived=number - len(failures), figure=figure, failures=tuple(failures[:5]))


def wrong(warm: WarmCompile, library: Path, before: dict[str, bytes]) -> str:
    """Say what is wrong with a library that must be the new one, whole, or what was there before."""
    found = contents(library)
    if found in (before, warm.new):
        return ""
    return f"{library.name} is neither what was there before nor what is compiled: it holds {sorted(found)}"


def _finish(warm: WarmCompile, bundle: Path) -> str:
    if (code := ended(fork(lambda: warm.run(bundle)))) != 0:
        return f"the next compilation ends with exit code {code}"
    folder = bundle / LIBRARY_FOLDER
    if beside := sorted(path.name for path in folder.iterdir() if path.name != warm.target):
        return f"left beside the library by the next compilation: {beside}"
    return wrong(warm, folder / warm.target, warm.new)


ROWS = (
    Row(
        name="B1 compile",
        fault="kill -9 during a compilation, half of them in place of a library",
        expected="no library, the old one or the new one, whole; the next compilation succeeds and leaves nothing else",
        quick=50,
        full=1000,
        run=kills_of_compilations,
    ),
)
