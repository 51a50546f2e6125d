"""Files of text that are written whole or not at all."""

from pathlib import Path

from engram_runtime.new_file import new_file


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 in place of what is there; a run that is cut off leaves that as it was.

    Raises:
        RequestError: see `engram_runtime.new_file.check_place`.
    """
    with new_file(path, replace=True) as file:
        file.write(text.encode())
