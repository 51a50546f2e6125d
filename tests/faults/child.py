"""``python -m tests.faults.child MODULE ROW COUNT FILE``: one row, what came of it as JSON in a file."""

import importlib
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from tests.faults.row import CannotRun, Row


def cpu_seconds(whose: int) -> float:
    """Return what this process or its ended children have computed."""
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run the row; anything but `CannotRun` ends this process with a traceback, which the runner shows."""
    module, name, count, path = sys.argv[1:]
    rows: tuple[Row, ...] = importlib.import_module(module).ROWS
    (row,) = (row for row in rows if row.name == name)
    try:
        found = asdict(row.run(int(count)))
    except CannotRun as reason:
        found = {"reason": str(reason)}
    found["cpu_s"] = sum(cpu_seconds(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
