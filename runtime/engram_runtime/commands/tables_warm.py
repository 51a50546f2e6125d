"""``engram tables warm``: bring the rows a text reads into the page cache."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import bundle_argument, json_option
from engram_runtime.commands.tables_options import site_option
from engram_runtime.errors import TableError
from engram_runtime.lens.addresses import PAGE_BYTES
from engram_runtime.lens.hot_rows import bring_in, hot_rows
from engram_runtime.lens.shares import format_share
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.lens.trace_file import read_trace
from engram_runtime.sizes import format_seconds, format_size, parse_size
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.opening import choose_stores, open_table
from engram_runtime.tables.options import AUTO, RESIDENT, TABLE_IO, TableOptions
from engram_runtime.tables.policy import TableChoice


@click.command()
@bundle_argument
@click.option("--from", "trace", required=True, type=click.Path(path_type=Path), help="Trace whose rows are read.")
@site_option
@click.option(
    "--ram", type=parse_size, metavar="SIZE", help="Most page cache to fill for each table.  [default: all rows]"
)
@click.option(
    "--table-io", type=click.Choice(TABLE_IO), default=AUTO, show_default=True, help="How BUNDLE's tables will be read."
)
@json_option
def warm(bundle: Path, trace: Path, site: str | None, ram: int | None, table_io: str, as_json: bool) -> None:
    """Bring a trace's rows into the page cache.

    Those read most often come first; BUNDLE's tables find them there when they are mapped or read row by row.
    """
    opened, read = Bundle.open(bundle), read_trace(trace)
    specs = {table.site: table for table in opened.manifest.tables}
    chosen = read.chosen(site)
    for each in chosen:
        if each.site not in specs:
            raise TableError(f"the trace has site {each.site}, bundle {bundle} has tables of {list(specs)}")
        each.check_table(opened, specs[each.site])
    choices = {choice.site: choice for choice in choose_stores(opened, TableOptions(io=table_io))}
    done = [_warm(opened, specs[each.site], choices[each.site], read, ram) for each in chosen]
    click.echo(json.dumps(done) if as_json else "\n".join(map(_text, done)))


def _warm(bundle: Bundle, spec: TableSpec, choice: TableChoice, trace: Trace, ram: int | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"site": spec.site, "io": choice.io, "reason": choice.reason}
    if choice.io == RESIDENT:
        return facts
    hot = hot_rows(trace, TraceSite.of(bundle, spec), ram)  # on the pages they are on here
    store = open_table(bundle, spec, choice.io)
    started = time.perf_counter()
    try:
        with click.progressbar(length=len(hot.row_ids), label=f"warming {spec.site}", file=sys.stderr) as bar:
            bring_in(store, spec, hot.row_ids, bar.update)
    finally:
        store.close()
    return {
        **facts,
        "rows": len(hot.row_ids),
        "bytes": len(hot.row_ids) * spec.record.record_bytes,
        "page_cache_bytes": hot.pages * PAGE_BYTES,
        "served": hot.served,
        "seconds": time.perf_counter() - started,
    }


def _text(facts: dict[str, Any]) -> str:
    if facts["io"] == RESIDENT:
        return f"{facts['site']}: nothing to do, the table is held in memory when it is opened: {facts['reason']}"
    return (
        f"{facts['site']}: {facts['rows']:,} rows, {format_size(facts['bytes'])} on "
        f"{format_size(facts['page_cache_bytes'])} of pages, in {format_seconds(facts['seconds'])}; they serve "
        f"{format_share(facts['served'])} of the trace's reads"
    )
