"""Rows that end in every way a row may end, for the test of what runs them."""

import os
import signal
import subprocess
import time

from tests.faults.row import CannotRun, Outcome, Row


def survives(count: int) -> Outcome:
    """Survive everything."""
    return Outcome(tried=count, survived=count, figure="0.1 s")


def loses_one(count: int) -> Outcome:
    """Survive all but one."""
    return Outcome(tried=count, survived=count - 1, failures=("seed 7",))


def crashes(count: int) -> Outcome:
    """End by a signal."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return survives(count)


def raises(_count: int) -> Outcome:
    """End with a traceback."""
    raise KeyError("tables")


def hangs(count: int) -> Outcome:
    """Wait, and have a child that waits."""
    subprocess.run(["sleep", "4242.25"], check=False)
    time.sleep(4242)
    return survives(count)


def cannot(_count: int) -> Outcome:
    """Lack something."""
    raise CannotRun("needs a disk that lies")


def is_long(_count: int) -> Outcome:
    """Mustn't be run in the quick tier."""
    raise AssertionError


ROWS = tuple(
    Row(name=name, fault="a fault", expected="nothing", quick=0 if run is is_long else 3, full=9, run=run)
    for name, run in (
        ("A1", survives),
        ("A2", loses_one),
        ("A10", crashes),
        ("B1", raises),
        ("C1 hang", hangs),
        ("D1", cannot),
        ("D2", is_long),
    )
)
