"""``python -m tests.faults [--full] [--json FILE] [ROW...]``: make the faults, print the table of what survived."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.rows import Placed, placed_rows
from tests.faults.runner import Result, run_rows
from tests.faults.table import table, write_json

QUICK_LIMIT_S = 900  # all rows take less than 10 minutes of two idle cores; others may use them too
FULL_LIMIT_S = 6 * 3600


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if everything that could be tried was survived."""
    arguments = parser().parse_args(argv)
    rows = chosen(placed_rows(), arguments.rows)
    results: list[Result] = []

    def show(result: Result) -> None:
        results.append(result)
        state = "not run" if result.reason else ("ok" if result.passed else "FAILED")
        sys.stderr.write(f"[{len(results)}/{len(rows)}] {result.name} {state}, {result.seconds:.0f} s\n")

    limit_s = FULL_LIMIT_S if arguments.full else QUICK_LIMIT_S
    ordered = run_rows(rows, lambda row: row.full if arguments.full else row.quick, limit_s, show)
    sys.stdout.write(table(ordered) + "\n")
    if arguments.json:
        write_json(arguments.json, "full" if arguments.full else "quick", ordered)
    return 0 if all(result.passed for result in ordered) else 1


def parser() -> argparse.ArgumentParser:
    """Return the arguments."""
    made = argparse.ArgumentParser(prog="python -m tests.faults", description="make faults, print what survived")
    made.add_argument("rows", nargs="*", metavar="ROW", help="as A1 or 'A3 onnx'; A3 is all rows of that number")
    made.add_argument("--full", action="store_true", help="the long tier: hours")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    return made


def chosen(rows: Sequence[Placed], names: Sequence[str]) -> list[Placed]:
    """Return the rows of these names, all for no name."""
    unknown = [name for name in names if not any(matches(each, name) for each in rows)]
    if unknown:
        known = ", ".join(each.row.name for each in rows)
        raise SystemExit(f"no row {', '.join(unknown)}; there are {known}")
    return [each for each in rows if not names or any(matches(each, name) for name in names)]


def matches(placed: Placed, name: str) -> bool:
    """Whether a name means a row."""
    return placed.row.name == name or placed.row.name.split(" ")[0] == name


if __name__ == "__main__":
    sys.exit(main())
