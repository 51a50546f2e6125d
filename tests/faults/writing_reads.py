"""B3: calls by which an export or a compilation reads fail, each on its own."""

import errno
import random
import tempfile
from pathlib import Path

from tests.faults import shim
from tests.faults.preloaded import preloaded
from tests.faults.row import Outcome, Row
from tests.faults.writing_errors import RUN_AGAIN_EVERY, fail_one
from tests.faults.writing_jobs import JOBS, Job

KINDS = ("open", "read", "pread")
NEVER = 10**9
# What is replaced is removed at the end, and if that can't be opened later.
WHOLE = "one sentence, exit code not 0, what was there before; or all of the new; the same again succeeds"


def reads_of_exports(count: int) -> Outcome:
    """Fail so many reads of the checkpoint and of what was just written, or all there are."""
    return _read_errors("export", count)


def reads_of_compilations(count: int) -> Outcome:
    """Fail so many reads of the bundle and of what was just written, or all there are."""
    return _read_errors("compile", count)


def _read_errors(name: str, count: int) -> Outcome:
    rng, failures, figures, tried = random.Random(f"B3 reads {name}"), [], [], 0
    root = Path(tempfile.mkdtemp())
    job = JOBS[name](root)
    made = {kind: calls for kind in KINDS if (calls := _calls(job, kind, root))}
    for kind, calls in made.items():
        chosen = rng.sample(range(1, calls + 1), min(calls, count // len(made)))
        for number in chosen:
            found = _failed(job, kind, number, root, again=tried % RUN_AGAIN_EVERY == 0)
            failures += [f"{kind} {number}: {found}"] * bool(found)
            tried += 1
        figures.append(f"{len(chosen)} of {calls} {kind}")
    return Outcome(tried=tried, survived=tried - len(failures), figure=", ".join(figures), failures=tuple(failures[:8]))


def _calls(job: Job, kind: str, root: Path) -> int:
    """Return how many calls of a kind there are where none fails."""
    never = shim.Fault(calls=(kind,), nth=NEVER, path=str(root))
    _, found = fail_one(job, never, root, again=False)
    if found:
        raise RuntimeError(f"undisturbed: {found}")
    return int((root / "count").read_text())


def _failed(job: Job, kind: str, number: int, root: Path, *, again: bool) -> str:
    """Say what is wrong after a call has failed."""
    fault = shim.Fault(calls=(kind,), nth=number, error=errno.EIO, path=str(root))
    hit, found = fail_one(job, fault, root, again=again)
    return found if hit else "the call wasn't made"


ROWS = (
    Row(
        name="B3 reads",
        fault="an open or read of the checkpoint, or of what was just written, fails in an export",
        expected=WHOLE,
        quick=30,
        full=10_000,
        run=preloaded(reads_of_exports),
    ),
    Row(
        name="B3 reads compile",
        fault="an open or read of the bundle, or of what was just written, fails in a compilation",
        expected=WHOLE,
        quick=12,
        full=10_000,
        run=preloaded(reads_of_compilations),
    ),
)
