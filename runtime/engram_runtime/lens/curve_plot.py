"""Draws hit rate against cache size."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from engram_runtime.lens.cache_curves import CacheCurve
from engram_runtime.lens.figures import new_figure, save_png
from engram_runtime.lens.shares import format_share
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"row": "#1f6f8b", "page": "#d1603d"}


def plot_curves(
    file: BinaryIO, trace: Trace, sites: Sequence[TraceSite], curves: Sequence[Sequence[CacheCurve]]
) -> None:
    """Write a PNG with the curves of each site below one another."""
    figure = new_figure(8, 0.6 + 3.6 * len(sites))
    for axes, site, of_site in zip(figure.subplots(len(sites), squeeze=False)[:, 0], sites, curves, strict=True):
        _draw(axes, site, of_site)
    figure.suptitle(f"{trace.model}: {trace.tokens:,} tokens of {trace.text}", fontsize=11, parse_math=False)
    save_png(figure, file)


def _draw(axes: "Axes", site: TraceSite, curves: Sequence[CacheCurve]) -> None:
    for curve in curves:
        label = f"{curve.unit}s of {curve.unit_bytes} bytes"
        rates = [100 * rate for rate in curve.hit_rates]
        axes.plot(curve.sizes, rates, color=COLOURS[curve.unit], marker="o", markersize=3, label=label)
        axes.axhline(100 * curve.curve.ceiling, color=COLOURS[curve.unit], linestyle=":", linewidth=1)
        axes.annotate(
            f"first touches above {format_share(curve.curve.ceiling)}",
            (curve.sizes[0], 100 * curve.curve.ceiling),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color=COLOURS[curve.unit],
        )
    sizes = max((curve.sizes for curve in curves), key=len)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes[::2], [format_size(size) for size in sizes[::2]], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, 104)
    axes.set_title(site.site, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("LRU cache")
    axes.set_ylabel("reads served, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
