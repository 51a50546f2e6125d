"""The figures of ``SECURITY.md``, which `make faults` wrote, and the page of the documentation that is made of it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "SECURITY.md"
FIGURES = ROOT / "docs" / "faults.json"
BLOCK = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)
HEADS = ("row", "fault", "tried", "survived", "figure", "limit")
COMMANDS = {"quick": "make faults", "full": "make faults-full"}


def security_text() -> str:
    """Return ``SECURITY.md`` with the figures of ``docs/faults.json``."""
    figures = figures_text(json.loads(FIGURES.read_text(encoding="utf-8")))
    return BLOCK.sub(lambda _: figures, SOURCE.read_text(encoding="utf-8"))


def security_page() -> str:
    """Return the page: the same, with links from its folder."""
    return (
        security_text()
        .replace("](docs/", "](")
        .replace("<!-- figures -->\n", "")
        .replace("<!-- end of figures -->", "")
    )


def figures_text(facts: Mapping[str, Any]) -> str:
    """Return a sentence, a table of the rows that ran, and a list of those that can't."""
    ran = [row for row in facts["rows"] if not row["reason"]]
    tried, survived = (sum(row[key] for row in ran) for key in ("tried", "survived"))
    command = f"`{COMMANDS[facts['tier']]}` on {facts['date']}, {facts['machine']}"
    left_out = [f"- {row['name']}, {row['fault']}: {row['reason']}" for row in facts["rows"] if row["reason"]]
    missing = ["Not run there:\n", *left_out, ""] if left_out else []
    return "\n".join([f"{command}: {survived:,} of {tried:,} faults survived.", "", *table(ran), "", *missing])


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for cells in (HEADS, ("---",) * len(HEADS), *map(cells_of, rows)):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def cells_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a line of the table; what wasn't survived stands out."""
    survived = f"{row['survived']:,}" if row["survived"] == row["tried"] else f"**{row['survived']:,}**"
    return row["name"], row["fault"], f"{row['tried']:,}", survived, row["figure"], row["expected"]
