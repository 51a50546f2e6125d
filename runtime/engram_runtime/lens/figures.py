"""Pictures by matplotlib, which is imported when one is asked for."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from engram_runtime.errors import RequestError, TargetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
MOST_PIXELS = 1 << 16  # that matplotlib draws, either way


def check_png(path: Path) -> None:
    """Refuse what would fail only after everything has been computed.

    Raises:
        RequestError: a name that doesn't end in .png.
        TargetError: there is no matplotlib.
    """
    if path.suffix != ".png":
        raise RequestError(f"plot {path} has the suffix {path.suffix!r}, expected .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise TargetError("plots need matplotlib: pip install 'engram-edge[plot]'")


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches; raises RequestError for one that is too high to be drawn."""
    from matplotlib.figure import Figure

    if height * DPI >= MOST_PIXELS:
        raise RequestError(
            f"the picture would be {height * DPI:.0f} pixels high, {MOST_PIXELS} are too many; choose one site with "
            f"--site"
        )
    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: "Figure", file: BinaryIO) -> None:
    """Write a figure."""
    figure.savefig(file, format="png", dpi=DPI)
