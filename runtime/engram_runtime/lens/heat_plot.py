"""Draws the heat of a table as PNG."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from engram_runtime.lens.figures import new_figure, save_png
from engram_runtime.lens.heat import HeatStrip
from engram_runtime.lens.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS, BLANK, LINE = "inferno", "#08060f", "#d1603d"


def plot_heat(file: BinaryIO, trace: Trace, strips: Sequence[HeatStrip]) -> None:
    """Write a PNG with the strips below one another, each with its share of first touches."""
    figure = new_figure(11, 0.7 + 3.4 * len(strips))
    figure.suptitle(f"{trace.model}: {trace.tokens:,} tokens of {trace.text}", fontsize=12, parse_math=False)
    for part, strip in zip(figure.subfigures(len(strips), 1, squeeze=False)[:, 0], strips, strict=True):
        _draw(part, strip)
    save_png(figure, file)


def with_commas(value: float, place: float | None) -> str:
    """Write a row or a token on its axis."""
    return f"{value:,.0f}"


def _draw(part: "SubFigure", strip: HeatStrip) -> None:
    heat, line = part.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    _draw_counts(part, heat, strip)
    edges = strip.token_edges
    line.stairs(100 * strip.first_touches, edges, color=LINE, linewidth=1.2)
    line.set_ylim(0, 105)
    line.set_xlim(edges[0], edges[-1])
    line.set_ylabel("first\ntouches, %", fontsize=8)
    line.set_xlabel("token", fontsize=9)
    line.xaxis.set_major_formatter(with_commas)
    line.tick_params(labelsize=8)
    line.spines[["top", "right"]].set_visible(False)
    line.grid(alpha=0.25)


def _draw_counts(part: "SubFigure", axes: "Axes", strip: HeatStrip) -> None:
    from matplotlib.colors import LogNorm

    counts = np.ma.masked_equal(strip.counts, 0)
    scale = LogNorm(*strip.colour_range, clip=True)
    axes.set_facecolor(BLANK)
    mesh = axes.pcolormesh(strip.token_edges, strip.row_edges, counts, cmap=COLOURS, norm=scale, rasterized=True)
    for head in strip.heads[1:-1]:
        axes.axhline(head, color="white", linewidth=0.4, alpha=0.5)
    axes.set_title(strip.title, fontsize=10, loc="left", parse_math=False)
    axes.set_ylabel("row", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter(with_commas)
    bar = part.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03)
    ticks = np.geomspace(*strip.colour_range, 4)
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:,.0f}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("reads", fontsize=8)
    bar.ax.tick_params(labelsize=8)
