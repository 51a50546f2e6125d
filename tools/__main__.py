"""``python -m tools``: write the parts of the documentation that are made of code."""

from pathlib import Path

from tools.pages import written_pages

for name, content in written_pages().items():
    (Path(__file__).parents[1] / "docs" / name).write_text(content, encoding="utf-8")
