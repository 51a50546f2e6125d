"""``engram tables heat``: a picture of where in a table a text reads."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import click

from engram_runtime.commands.options import force_option, json_option
from engram_runtime.commands.tables_options import site_option, trace_argument
from engram_runtime.errors import RequestError
from engram_runtime.lens.figures import check_png
from engram_runtime.lens.heat import HeatStrip, heat_strips
from engram_runtime.lens.heat_page import write_heat_page
from engram_runtime.lens.heat_plot import plot_heat
from engram_runtime.lens.trace import Trace
from engram_runtime.lens.trace_file import read_trace
from engram_runtime.new_file import check_place, new_file

PNG, HTML = ".png", ".html"
WRITERS: dict[str, Callable[[BinaryIO, Trace, Sequence[HeatStrip]], None]] = {PNG: plot_heat, HTML: write_heat_page}


@click.command()
@trace_argument
@site_option
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write, .png or .html.")
@force_option
@json_option
def heat(trace: Path, site: str | None, out: Path, force: bool, as_json: bool) -> None:
    """Draw which rows are read over time.

    Each n-gram order of each site of TRACE is a strip. A .html file stands by itself and tells what is under the
    pointer; .png needs engram-edge[plot].
    """
    if out.suffix not in WRITERS:
        raise RequestError(f"picture {out} has the suffix {out.suffix!r}, expected .png or .html")
    if out.suffix == PNG:
        check_png(out)
    check_place(out, replace=force)
    read = read_trace(trace)
    strips = [strip for chosen in read.chosen(site) for strip in heat_strips(read, chosen)]
    with new_file(out, replace=force) as file:
        WRITERS[out.suffix](file, read, strips)
    if as_json:
        facts = [
            {"site": strip.site, "order": strip.order, "reads": strip.reads, "distinct": strip.distinct}
            for strip in strips
        ]
        click.echo(json.dumps({"file": str(out), "tokens": read.tokens, "strips": facts}))
    else:
        click.echo("\n".join([f"{out}: {len(strips)} strips", *(f"  {strip.title}" for strip in strips)]))
