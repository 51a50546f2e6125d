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


def draw_all(recall: Sequence[Row], report: Mapping[str, Any], folder: Path) -> None:
    """Write ``recall.png``, ``perplexity.png`` (of foreign text, rows as they are shipped) and ``acceptance.png``."""
    foreign = [row for row in report["perplexity"] if "statements" not in row["text"] and row["rows"] == "int4"]
    _save(_recall(recall), folder / "recall.png")
    _save(_perplexity(foreign), folder / "perplexity.png")
    _save(_acceptance(report["acceptance"]), folder / "acceptance.png")


def acceptance_texts(by_text: Row) -> list[str]:
    """Return the domains that drafts were counted in, and ``all``."""
    return [name for name, figures in by_text.items() if "every_position" in figures]


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


def _acceptance(drafters: Row) -> "Figure":
    """Draw how many first, first two and first three drafts are accepted, by domain, one panel a drafter."""
    figure = new_figure(9, 3.2)
    panels = figure.subplots(1, len(drafters), sharey=True, squeeze=False)[0]
    for axes, (drafter, by_text) in zip(panels, drafters.items(), strict=True):
        for text in acceptance_texts(by_text):
            shares = list(by_text[text]["every_position"].values())
            values = [share["value"] for share in shares]
            around = [
                [share["value"] - share["low"] for share in shares],
                [share["high"] - share["value"] for share in shares],
            ]
            style = {"color": "black", "linewidth": 2} if text == "all" else {"linewidth": 1}
            axes.errorbar(range(1, len(values) + 1), values, yerr=around, marker="o", markersize=3, label=text, **style)
        axes.set_title(drafter, fontsize=9)
        axes.set_xticks([1, 2, 3])
        axes.set_xlabel("drafts in a row, all right", fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of positions")
    panels[-1].legend(frameon=False, fontsize=8)
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
