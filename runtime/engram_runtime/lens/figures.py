"""Pictures by matplotlib, which is imported when one is asked for."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from engram_runtime.errors import RequestError, TargetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


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
    """Return an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure."""
    figure.savefig(path, format="png", dpi=DPI)
