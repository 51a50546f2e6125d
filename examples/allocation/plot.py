"""The picture of a sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_runtime.lens.figures import new_figure, save_png
from engram_runtime.new_file import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 10.0, 4.2


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the loss, and how much it differs from that of a model without a table, against the table's share."""
    figure = new_figure(WIDTH, HEIGHT)
    losses, differences = figure.subplots(1, 2)
    draw_losses(losses, results["divisions"])
    draw_differences(differences, results["divisions"])
    total, active = (results["divisions"][0][name] / 1e6 for name in ("parameters", "active_parameters"))
    figure.suptitle(
        f"{total:.2f}M parameters, {active:.2f}M of them active, {results['training_tokens'] / 1e6:.2f}M tokens, "
        f"{results['seeds']} seeds"
    )
    with new_file(path, replace=True) as file:
        save_png(figure, file)


def draw_losses(axes: "Axes", divisions: list[dict[str, Any]]) -> None:
    """Draw the mean over seeds as a line, each seed as a point."""
    shares = [100 * division["share"] for division in divisions]
    axes.plot(shares, [division["validation_loss"] for division in divisions], color="tab:blue")
    for share, division in zip(shares, divisions, strict=True):
        seeds = division["validation_loss_of_seeds"]
        axes.plot([share] * len(seeds), seeds, "o", color="tab:blue", markersize=4)
    axes.set_ylabel("validation loss (nats per token)")
    label_shares(axes, shares, divisions)


def draw_differences(axes: "Axes", divisions: list[dict[str, Any]]) -> None:
    """Draw differences with their 95 % intervals."""
    shares = [100 * division["share"] for division in divisions]
    against = [division["against_no_table"] for division in divisions]
    means = [each["mean"] for each in against]
    reach = [each["interval"][1] - each["mean"] for each in against]
    axes.errorbar(shares, means, yerr=reach, marker="o", markersize=4, capsize=3, color="tab:orange")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("loss less that without a table (95 %)")
    label_shares(axes, shares, divisions)


def label_shares(axes: "Axes", shares: list[float], divisions: list[dict[str, Any]]) -> None:
    """Label the shares, and above them the numbers of experts."""
    axes.set_xlabel("share of the sparse budget in the table (%)")
    axes.grid(alpha=0.3)
    above = axes.secondary_xaxis("top")
    above.set_xticks(shares, [str(division["experts"]) for division in divisions])
    above.set_xlabel("experts per block")
