"""``engram tables stat``: what is in the rows of a table."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import bundle_argument, json_option
from engram_runtime.commands.tables_options import chosen_tables, site_option
from engram_runtime.golden import GOLDEN_FILE, Golden
from engram_runtime.lens.shares import format_share
from engram_runtime.lens.table_stats import table_stats
from engram_runtime.sizes import format_size
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.checksums import read_checksums
from engram_runtime.tables.files import FileTable

BAR = 40  # characters of the longest bar


@click.command()
@bundle_argument
@site_option
@click.option(
    "--rows", type=click.IntRange(min=1), help="Rows to read at least, in blocks evenly spread.  [default: all]"
)
@json_option
def stat(bundle: Path, site: str | None, rows: int | None, as_json: bool) -> None:
    """Tell norms, dead rows and copies of its tables.

    Also what BUNDLE's rows would lose by being quantised, where engram-edge[export] is installed.
    """
    opened = Bundle.open(bundle)
    found = [_stat(opened, spec, rows) for spec in chosen_tables(opened, site)]
    parity = _parity(opened)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "tables": found, "export_parity": parity}))
        return
    lines = [line for facts in found for line in _lines(facts)]
    if parity:
        told = ", ".join(f"{name} {value:.4g}" for name, value in parity.items())
        lines.append(f"logits at export against the checkpoint, whatever was quantised: {told}")
    click.echo("\n".join(lines))


def _stat(bundle: Bundle, spec: TableSpec, rows: int | None) -> dict[str, Any]:
    total = spec.num_rows if rows is None else min(rows, spec.num_rows)
    with (
        FileTable(spec, bundle.table_path, checksums=read_checksums(bundle, spec)) as table,
        click.progressbar(length=total, label=f"reading {spec.site}", file=sys.stderr) as bar,
    ):
        return table_stats(spec, table, rows, bar.update).to_dict()


def _parity(bundle: Bundle) -> dict[str, float]:
    listed = any(entry.path == GOLDEN_FILE for entry in bundle.manifest.files)
    return Golden.read(bundle).parity if listed else {}


def _lines(facts: dict[str, Any]) -> list[str]:
    record, rows = facts["record"], facts["rows"]
    read = "all read" if facts["rows_read"] >= rows else f"{facts['rows_read']:,} of them read"
    return [
        f"{facts['site']}: {rows:,} rows of {facts['record_bytes']} bytes ({record['payload']} x {record['columns']}, "
        f"scale {record['scale']}), {format_size(rows * facts['record_bytes'])}, {read}",
        f"  {facts['rows_unreachable']:,} rows that no n-gram leads to",
        f"  {_standing_out(facts['zero'], 'all zeros')}",
        f"  {_standing_out(facts['not_finite'], 'NaN or infinite values')}",
        f"  {_copies(facts['copies'])}",
        f"  norms    {_norms(facts['norms'])}",
        *(f"    {line}" for line in _bars(facts["norms"]["histogram"])),
        *(
            f"  {column['order']}-gram head {column['head']:<3} from row {column['first_row']:<12,} {_norms(column)}"
            for column in facts["columns"]
        ),
        *(f"  as {dtype:5}{_error(error)}" for dtype, error in facts["requantised"].items()),
    ]


def _standing_out(rows: dict[str, Any], what: str) -> str:
    named = ", ".join(map(str, rows["first"]))
    return f"{rows['rows']:,} rows of {what}" + (f", first {named}" if named else "")


def _copies(copies: dict[str, Any]) -> str:
    whole = copies["share_compared"] == 1
    which = "all" if whole else f"{format_share(copies['share_compared'])}, chosen by hash,"
    return (
        f"{copies['rows']:,} rows are copies of an earlier one; {copies['compared']:,} were compared, {which} that are "
        f"finite and not zero"
    )


def _norms(norms: dict[str, Any]) -> str:
    if not norms["rows"]:
        return "of no row"
    return ", ".join(f"{name} {norms[name]:.4g}" for name in ("min", "median", "p99", "max"))


def _bars(histogram: list[list[float]]) -> list[str]:
    most = max((count for _, _, count in histogram), default=1)
    return [f"{low:10.4g} {'█' * round(BAR * count / most):{BAR}} {int(count):,}" for low, _, count in histogram]


def _error(error: dict[str, float] | str) -> str:
    if isinstance(error, str):
        return error
    return (
        f"{format_share(error['mean'])} off on average, {format_share(error['max'])} at most, of {error['rows']:,} rows"
    )
