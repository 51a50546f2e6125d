"""``engram tables mrc``: what a cache of a size would serve."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from engram_runtime.commands.options import force_option, json_option
from engram_runtime.commands.tables_options import site_option, trace_argument
from engram_runtime.lens.cache_curves import UNITS, CacheCurve, cache_curve
from engram_runtime.lens.curve_plot import plot_curves
from engram_runtime.lens.figures import check_png
from engram_runtime.lens.shares import format_share
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.lens.trace_file import read_trace
from engram_runtime.new_file import check_place, new_file
from engram_runtime.sizes import format_size

STEPS = 100  # of the progress bar for a curve


def parse_rate(context: click.Context, parameter: click.Parameter, value: str) -> float | None:
    """Return a share in (0, 1], or None for ``auto``."""
    if value == "auto":
        return None
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1:
        raise click.BadParameter(f"{value!r} is not auto or a share above 0 and up to 1")
    return rate


@click.command()
@trace_argument
@site_option
@click.option("--unit", type=click.Choice(UNITS), help="Cache rows packed, or pages.  [default: both]")
@click.option(
    "--sample",
    metavar="RATE|auto",
    callback=parse_rate,
    default="auto",
    show_default=True,
    help="Share of rows or pages to look at.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="PNG file to write; needs engram-edge[plot].")
@force_option
@json_option
def mrc(
    trace: Path, site: str | None, unit: str | None, sample: float | None, plot: Path | None, force: bool, as_json: bool
) -> None:
    """Tell what caches would serve: a miss-ratio curve.

    Prints which share of TRACE's reads LRU caches of rows, and of pages, would serve. Curves are exact for
    up to 4 million reads of rows or pages, others are of a sample.
    """
    if plot is not None:
        check_png(plot)
        check_place(plot, replace=force)
    read = read_trace(trace)
    units = UNITS if unit is None else (unit,)
    sites = read.chosen(site)
    curves = _curves(read, sites, units, sample)
    if plot is not None:
        with new_file(plot, replace=force) as file:
            plot_curves(file, read, sites, curves)
    if as_json:
        made = [
            {"site": at.site, "curves": [each.to_dict() for each in of]} for at, of in zip(sites, curves, strict=True)
        ]
        click.echo(json.dumps({"trace": str(trace), "tokens": read.tokens, "sites": made}))
    else:
        click.echo("\n\n".join(_table(at, of) for at, of in zip(sites, curves, strict=True)))


def _curves(
    trace: Trace, sites: Sequence[TraceSite], units: Sequence[str], rate: float | None
) -> list[list[CacheCurve]]:
    done = 0.0
    with click.progressbar(length=STEPS * len(sites) * len(units), label="counting", file=sys.stderr) as bar:

        def progress(share: float) -> None:
            nonlocal done
            done += share * STEPS
            bar.update(round(done) - bar.pos)

        return [[cache_curve(trace, site, unit, rate, progress) for unit in units] for site in sites]


def _table(site: TraceSite, curves: Sequence[CacheCurve]) -> str:
    longest = max(curves, key=lambda curve: len(curve.sizes))
    lines = [_title(site, curve) for curve in curves]
    lines.append(f"{'cache':>10}" + "".join(f"{curve.unit + 's':>10}" for curve in curves))
    for place, size in enumerate(longest.sizes):
        rates = (curve.hit_rates[min(place, len(curve.sizes) - 1)] for curve in curves)
        lines.append(f"{format_size(size):>10}" + "".join(f"{format_share(rate):>10}" for rate in rates))
    return "\n".join([*lines, *(curve.verdict for curve in curves)])


def _title(site: TraceSite, curve: CacheCurve) -> str:
    how = "exact" if curve.curve.rate == 1 else f"from a sample of {format_share(curve.curve.rate)}"
    whole = format_size(curve.curve.distinct * curve.unit_bytes)
    return (
        f"{site.site}: {curve.curve.accesses:,} reads of {curve.curve.distinct:,} {curve.unit}s "
        f"of {curve.unit_bytes} bytes, {whole} in all, {how}"
    )
