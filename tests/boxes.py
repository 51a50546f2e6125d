"""Boxes that packed folders are copied to: Python environments with the packages they name and nothing else."""

import os
import subprocess
import venv
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from engram_compilers.pack.packages import MODULES


@dataclass(frozen=True)
class Box:
    """A Python without packages, away from the checkout."""

    python: Path

    def run(self, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a folder's ``engram``, or, after ``-c``, a program of this Python there."""
        start = [] if arguments[0] == "-c" else ["engram"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
        line = [str(self.python), *start, *map(str, arguments)]
        return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def make_box(home: Path) -> Box:
    """Make an empty Python environment."""
    venv.create(home, with_pip=False)
    return Box(home / "bin" / "python")


def add_site(folder: Path) -> None:
    """Give a packed folder the packages its requirements name, as pip would, from those of this environment."""
    site = folder / "site"
    site.mkdir()
    for name in MODULES:
        installed = distribution(name)
        assert installed.files is not None
        for top in {path.parts[0] for path in installed.files} - {".."}:
            (site / top).symlink_to(Path(str(installed.locate_file(top))))
