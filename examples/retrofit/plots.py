"""Plots of an evaluation, as PNG beside the model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_runtime.lens.figures import new_figure, save_png
from engram_runtime.new_file import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"dictionary": "#1f6f8b", "manual": "#d1603d", "off": "#8a8a8a"}
LIMIT_PERCENT = 2  # what a table may cost on foreign text

Row = Mapping[str, Any]


def draw_all(recall: Sequence[Row], perplexity: Sequence[Row], folder: Path) -> None:
    """Write ``recall.png`` and, of foreign text, ``perplexity.png``."""
    _save(_recall(recall), folder / "recall.png")
    _save(_perplexity([row for row in perplexity if "statements" not in row["text"]]), folder / "perplexity.png")


def _save(figure: "Figure", path: Path) -> None:
    with new_file(path, replace=True) as file:
        save_png(figure, file)


def _recall(rows: Sequence[Row]) -> "Figure":
    figure = new_figure(9, 1 + 0.26 * len(rows))
    axes = figure.subplots()
    labels = [f"{row['facts']}: {row['wording']}  ({row['rows']} rows, {row['executor']})" for row in rows]
    _intervals(axes, rows, labels, [100 * row["share"] for row in rows], scale=100)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("facts stated word for word, % (95 % Wilson intervals)")
    return figure


def _perplexity(rows: Sequence[Row]) -> "Figure":
    figure = new_figure(7, 1 + 0.3 * len(rows))
    axes = figure.subplots()
    axes.axvspan(-LIMIT_PERCENT, LIMIT_PERCENT, color="#eeeeee", zorder=0)
    axes.axvline(0, color="black", linewidth=0.8)
    _intervals(axes, rows, [row["text"] for row in rows], [100 * (row["ratio"] - 1) for row in rows], scale=100, base=1)
    axes.set_xlabel("perplexity against no rows, % (95 % paired bootstrap intervals)")
    return figure


def _intervals(
    axes: "Axes", rows: Sequence[Row], labels: Sequence[str], values: Sequence[float], *, scale: float, base: float = 0
) -> None:
    """Draw one line a row, the first on top, coloured by cartridge."""
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        low, high = (scale * (row[end] - base) for end in ("low", "high"))
        around = [[max(0, value - low)], [max(0, high - value)]]
        axes.errorbar([value], [place], xerr=around, fmt="o", markersize=4, color=COLOURS[row["cartridge"]])
    for cartridge in dict.fromkeys(row["cartridge"] for row in rows):
        axes.plot([], [], "o", color=COLOURS[cartridge], label=f"cartridge: {cartridge}")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
