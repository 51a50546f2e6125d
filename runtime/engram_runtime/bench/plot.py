"""Draws how fast prompts and answers are after how many tokens."""

import statistics
from typing import TYPE_CHECKING, BinaryIO

from engram_runtime.bench.report import BY_ROUND, Tree
from engram_runtime.lens.figures import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f6f8b", "#d1603d")
SPEEDS = {"decode": "decode_tokens", "prefill": "prompt_tokens"}  # and how many tokens they are of


def plot_speeds(file: BinaryIO, report: Tree) -> None:
    """Write a PNG of a report of `engram_runtime.bench.report.report`: medians, least and largest of the rounds."""
    runners = [report, report["against"]] if "against" in report else [report]
    figure = new_figure(9, 3.6)
    for axes, (speed, tokens) in zip(figure.subplots(1, len(SPEEDS)), SPEEDS.items(), strict=True):
        for runner, colour in zip(runners, COLOURS, strict=False):
            _draw(axes, runner, f"{speed}_tok_s", colour)
        axes.set_title(f"{speed} of {report[tokens]} tokens", fontsize=10, loc="left")
        axes.set_xlabel("tokens before")
        axes.set_ylabel("tok/s")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    save_png(figure, file)


def _draw(axes: "Axes", runner: Tree, key: str, colour: str) -> None:
    depths = {int(depth): sorted(speeds[key]) for depth, speeds in runner[BY_ROUND]["depths"].items()}
    medians = {depth: statistics.median(depths[depth]) for depth in sorted(depths)}
    below = [median - depths[depth][0] for depth, median in medians.items()]
    above = [depths[depth][-1] - median for depth, median in medians.items()]
    label = f"{runner['runner']}, {runner['threads']} threads"
    axes.errorbar(
        list(medians), list(medians.values()), yerr=[below, above], color=colour, marker="o", capsize=3, label=label
    )
