"""The table of faults for a terminal, and as JSON for the documentation."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.faults.runner import Result

HEADS = ("row", "fault", "tried", "survived", "figure", "limit", "s", "cpu s")


def table(results: Sequence[Result]) -> str:
    """Return rows in columns, what can't run with its reason in place of the figure, and failures below."""
    lines = [HEADS, *(cells(result) for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n\n".join([text, *(failures(result) for result in results if not result.passed), summary(results)])


def cells(result: Result) -> tuple[str, ...]:
    """Return the columns of a row."""
    figure = f"not run: {result.reason}" if result.reason else result.figure
    return (
        result.name,
        result.fault,
        f"{result.tried:,}",
        f"{result.survived:,}",
        figure,
        result.expected,
        f"{result.seconds:.0f}",
        f"{result.cpu_s:.0f}",
    )


def failures(result: Result) -> str:
    """Return the first faults of a row that weren't survived."""
    found = result.failures or ("nothing was tried" if not result.tried else "no description",)
    return "\n".join([f"{result.name}: {result.tried - result.survived:,} not survived", *found])


def summary(results: Sequence[Result]) -> str:
    """Return one line on all."""
    run = [result for result in results if not result.reason]
    tried, survived = sum(result.tried for result in run), sum(result.survived for result in run)
    skipped = len(results) - len(run)
    cpu_s = sum(result.cpu_s for result in results)
    counts = f"{len(run)} rows: {survived:,} of {tried:,} faults survived; {skipped} rows not run"
    return f"{counts}; {cpu_s:.0f} s of a core"


def rounded(result: Result) -> dict[str, float]:
    """Return the times of a row."""
    return {"seconds": round(result.seconds, 1), "cpu_s": round(result.cpu_s, 1)}


def write_json(path: Path, tier: str, results: Sequence[Result]) -> None:
    """Write the table for ``python -m tools``, which makes pages of it."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    facts = {
        "tier": tier,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "rows": [asdict(result) | rounded(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
