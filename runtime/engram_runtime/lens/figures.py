"""Pictures by matplotlib, which is imported when one is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from engram_runtime.errors import RequestError, TargetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches; raises TargetError where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise TargetError("plots need matplotlib: pip install 'engram-edge[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure; raises RequestError for a name that doesn't end in .png."""
    if path.suffix != ".png":
        raise RequestError(f"plot {path} has the suffix {path.suffix!r}, expected .png")
    figure.savefig(path, format="png", dpi=DPI)
