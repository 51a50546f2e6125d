"""B3: every call by which something is written fails in turn, once or from then on."""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
from tests.faults import shim
from tests.faults.preloaded import preloaded
from tests.faults.row import Outcome, Row
from tests.faults.warm import ended, fork
from tests.faults.writing_jobs import JOBS, Job

from engram_runtime.command_line import run_command

KINDS = ("create", "write", "fsync", "close", "truncate", "rename", "mkdir", "unlink", "rmdir", "copy")
# What is left, or can't be opened to be removed, is removed later (`writing_reads`); a folder may be there already.
MAY_BE_IN_VAIN = ("unlink", "rmdir", "copy", "mkdir", "open")
ERRORS = (errno.EIO, errno.ENOSPC)
RUN_AGAIN_EVERY = 6


@dataclass(slots=True)
class _Tally:
    """Faults made, how many of them for good, calls by their kind, and what was wrong after some faults."""

    tried: int = 0
    sticky: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def _failing(name: str) -> Callable[[int], Outcome]:
    """Return the row of a job."""

    def run(count: int) -> Outcome:
        root = Path(tempfile.mkdtemp())
        job = JOBS[name](root)
        tally = _Tally()
        for kind in KINDS:
            _fail_all(job, kind, root, count, tally)
        if tally.tried == 0:
            raise RuntimeError("no call was made to fail")
        sites = ", ".join(f"{number} {kind}" for kind, number in tally.sites.items() if number)
        sites += f"; {tally.tried - tally.sticky} once, {tally.sticky} from then on"
        survived = tally.tried - len(tally.failures)
        return Outcome(tried=tally.tried, survived=survived, figure=sites, failures=tuple(tally.failures[:8]))

    return run


def _fail_all(job: Job, kind: str, root: Path, count: int, tally: _Tally) -> None:
    """Fail the first call of a kind, the second, ... until none is left; beyond ``count`` faults no sticky ones."""
    number = 0
    while True:
        number += 1
        modes = (False, True) if tally.tried < count else (False,)
        for sticky in modes:
            fault = shim.Fault(
                calls=(kind,), nth=number, error=ERRORS[number % 2], sticky=sticky, path=str(root / "place")
            )
            hit, found = fail_one(job, fault, root, again=tally.tried % RUN_AGAIN_EVERY == 0)
            if not hit:
                tally.sites[kind] = number - 1
                if found:
                    tally.failures.append(f"{kind}, none fails: {found}")
                return
            tally.tried += 1
            tally.sticky += sticky
            if found:
                often = "all from" if sticky else "call"
                tally.failures.append(f"{kind}, {often} {number}, {os.strerror(fault.error)}: {found}")


def fail_one(job: Job, fault: shim.Fault, root: Path, *, again: bool) -> tuple[bool, str]:
    """Do a job while calls fail; returns whether any did and what is wrong then."""
    place, said, count = root / "place", root / "said", root / "count"
    if place.exists():
        shutil.rmtree(place)
    place.mkdir()
    count.unlink(missing_ok=True)  # of the fault before
    job.prepare(place)
    code = ended(fork(lambda: _command(job, place, fault, said, count)))
    hit = int(count.read_text()) >= fault.nth if count.exists() else True
    text = said.read_text(errors="replace")
    if not hit:
        return False, job.wrong(place, True) if code == 0 else f"exit code {code}: {text[-300:]}"
    found = _wrong_end(code, text, fault) or job.wrong(place, code == 0)
    if not found and again:
        code = ended(fork(lambda: _command(job, place, None, said, count)))
        found = job.wrong(place, True) if code == 0 else f"run again: exit code {code}: {said.read_text()[-300:]}"
    return True, found


def _wrong_end(code: int, text: str, fault: shim.Fault) -> str:
    if "Traceback" in text:
        return f"a traceback: {text[-600:]}"
    if code == 0:
        return "" if fault.calls[0] in MAY_BE_IN_VAIN else "exit code 0, as if nothing had failed"
    if f"/{Path(fault.path).name}" not in text.rpartition("engram: ")[2]:
        return f"a sentence that doesn't say where: {text[-300:]!r}"
    if code < 0 or not any(line.startswith("engram: ") for line in text.splitlines()):  # TVM may warn after it
        return f"exit code {code}, without a sentence: {text[-300:]!r}"
    return ""


def _command(job: Job, place: Path, fault: shim.Fault | None, said: Path, count: Path) -> None:
    """Do a job as a command does, its words in a file; ends this process."""
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["engram"]
    code: object = 0
    if fault is not None:
        shim.arm(fault)
    try:
        run_command(click.Command("engram", callback=lambda: job.run(place)), "engram")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - that there is a traceback is what is looked for
        traceback.print_exc()
        code = 99
    made = shim.disarm()
    with contextlib.suppress(AttributeError, ValueError):
        sys.stderr.flush()
    count.write_text(str(made))
    assert isinstance(code, int)
    os._exit(code)


def export_errors(count: int) -> Outcome:
    """Exports to a new place."""
    return _failing("export")(count)


def replacement_errors(count: int) -> Outcome:
    """Exports in place of a bundle."""
    return _failing("replacement")(count)


def compile_errors(count: int) -> Outcome:
    """Compilations."""
    return _failing("compile")(count)


def file_errors(count: int) -> Outcome:
    """Packed bundles, overlays, traces and answers of a batch."""
    outcomes = {name: _failing(name)(count) for name in ("pack", "overlay", "trace", "batch")}
    return Outcome(
        tried=sum(outcome.tried for outcome in outcomes.values()),
        survived=sum(outcome.survived for outcome in outcomes.values()),
        figure="; ".join(f"{name}: {outcome.tried}" for name, outcome in outcomes.items()),
        failures=tuple(f"{name}: {text}" for name, outcome in outcomes.items() for text in outcome.failures),
    )


FAULT = "every create, write, fsync, close, truncate, rename, mkdir, unlink of {} fails, some from then on"
EXPECTED = "one sentence, exit code not 0, what was there before; the same again succeeds"
ROWS = (
    Row(
        name="B3",
        fault=FAULT.format("an export"),
        expected=EXPECTED,
        quick=150,
        full=10_000,
        run=preloaded(export_errors),
    ),
    Row(
        name="B3 replace",
        fault=FAULT.format("an export in place of a bundle"),
        expected=EXPECTED,
        quick=0,
        full=10_000,
        run=preloaded(replacement_errors),
    ),
    Row(
        name="B3 compile",
        fault=FAULT.format("a compilation"),
        expected=EXPECTED,
        quick=0,
        full=10_000,
        run=preloaded(compile_errors),
    ),
    Row(
        name="B3 files",
        fault=FAULT.format("a packed bundle, an overlay, a trace, a batch's answers"),
        expected=EXPECTED,
        quick=1000,
        full=10_000,
        run=preloaded(file_errors),
    ),
)
