"""Rows whose faults are made by the shim run in a process that was started with it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from tests.faults import shim
from tests.faults.row import CannotRun, Outcome

Work = Callable[[int], Outcome]


def preloaded(work: Work) -> Work:
    """Return a row's function that does the work of a function of a module in a process with the shim."""

    def run(count: int) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "outcome.json"
            command = [sys.executable, "-X", "faulthandler", "-m", __name__, work.__module__, work.__name__]
            subprocess.run([*command, str(count), str(found)], env=shim.preloaded(), check=True)
            outcome = json.loads(found.read_text())
        if "reason" in outcome:
            raise CannotRun(outcome["reason"])
        return Outcome(**outcome | {"failures": tuple(outcome["failures"])})

    return run


def main() -> None:
    """Do what a row asked for; the processes that this one starts run without the shim."""
    del os.environ["LD_PRELOAD"]
    module, name, count, path = sys.argv[1:]
    try:
        found = asdict(getattr(import_module(module), name)(int(count)))
    except CannotRun as reason:
        found = {"reason": str(reason)}
    Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
