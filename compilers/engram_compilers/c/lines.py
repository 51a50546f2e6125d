"""Lines of a C function in the making."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    defines: str  # the name of a constant that is all the line is for, or ""


@dataclass(slots=True)
class Lines:
    """Statements, indented; constants that nothing reads are left out in the end."""

    indent: int = 1
    lines: list[_Line] = field(default_factory=list)

    def add(self, text: str, defines: str = "") -> None:
        """Add a line; ``defines`` is the name of what it defines without further effect."""
        self.lines.append(_Line("  " * self.indent + text, defines))

    @contextmanager
    def block(self, opening: str) -> Iterator[None]:
        """Put the lines added meanwhile between braces."""
        self.add(f"{opening} {{")
        self.indent += 1
        yield
        self.indent -= 1
        self.add("}")

    @contextmanager
    def aside(self) -> Iterator["Lines"]:
        """Collect the lines added meanwhile apart, indented by one more."""
        kept, self.lines = self.lines, []
        apart = Lines(self.indent + 1, self.lines)
        self.indent += 1
        yield apart
        self.indent -= 1
        self.lines = kept

    def extend(self, other: "Lines") -> None:
        """Add lines that were collected apart."""
        self.lines.extend(other.lines)

    @property
    def text(self) -> str:
        """All lines that matter."""
        kept: list[str] = []
        read: set[str] = set()
        for line in reversed(self.lines):
            if not line.defines or line.defines in read:
                kept.append(line.text)
                read.update(_WORD.findall(line.text.partition("=")[2] if line.defines else line.text))
        return "\n".join(reversed(kept))
