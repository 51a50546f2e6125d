"""``engram tables diff``: an overlay that turns one bundle's table into another's."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import force_option, json_option
from engram_runtime.commands.tables_options import only_table
from engram_runtime.tables.checksums import read_checksums
from engram_runtime.tables.difference import check_comparable, different_rows
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.overlay_file import OverlaySpec, write_overlay_blocks


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The overlay to write.")
@click.option("--site", help="Whose table.  [default: the only one]")
@force_option
@json_option
def diff(first: Path, second: Path, out: Path, site: str | None, force: bool, as_json: bool) -> None:
    """Write the rows of bundle SECOND that differ from bundle FIRST's, for `engram run FIRST --overlay OUT`."""
    bundles = Bundle.open(first), Bundle.open(second)
    tables = only_table(bundles[0], site), only_table(bundles[1], site)
    specs = OverlaySpec.of(bundles[0], tables[0]), OverlaySpec.of(bundles[1], tables[1])
    check_comparable(*specs)
    with (
        FileTable(tables[0], bundles[0].table_path, checksums=read_checksums(bundles[0], tables[0])) as before,
        FileTable(tables[1], bundles[1].table_path, checksums=read_checksums(bundles[1], tables[1])) as after,
        click.progressbar(length=tables[0].num_rows, label="comparing", file=sys.stderr) as bar,
    ):
        blocks = different_rows(before, after, (specs[0].record, specs[1].record), tables[0].num_rows, bar.update)
        count = write_overlay_blocks(out, specs[1], blocks, replace=force)
    report = {"site": specs[1].site, "rows": tables[0].num_rows, "different": count, "bytes": out.stat().st_size}
    click.echo(json.dumps(report) if as_json else _sentence(report, out))


def _sentence(report: dict[str, Any], out: Path) -> str:
    return (
        f"{report['different']:,} of {report['rows']:,} rows of {report['site']} differ; "
        f"{out} holds them in {report['bytes']:,} bytes"
    )
