"""``python -m tools``: write the parts of the documentation that are made of code."""

import json
from pathlib import Path

from tools.command_reference import command_reference
from tools.manifest_schema import manifest_schema

DOCS = Path(__file__).parents[1] / "docs"


def written_pages() -> dict[str, str]:
    """Return the content of each file by its name in ``docs/``."""
    return {
        "commands.md": command_reference(),
        "engram.schema.json": json.dumps(manifest_schema(), indent=1) + "\n",
    }


if __name__ == "__main__":
    for name, content in written_pages().items():
        (DOCS / name).write_text(content, encoding="utf-8")
