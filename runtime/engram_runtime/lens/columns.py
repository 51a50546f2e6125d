"""Text in columns of a terminal, whatever characters it holds."""

import unicodedata

CUT = "…"


def quoted(text: str) -> str:
    """Return a text between quotes on one line, what can't be printed as an escape."""
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text) + '"'


def width(text: str) -> int:
    """Return how many columns a printable text takes: wide characters two, marks on the one before none."""
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def column(text: str, columns: int) -> str:
    """Pad a text to a number of columns, its beginning cut off where it is wider."""
    if width(text) > columns:
        while width(text) > columns - len(CUT):
            text = text[1:]
        text = CUT + text
    return text + " " * (columns - width(text))
