"""Arguments that the commands on tables and traces share."""

from pathlib import Path

import click

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.table_spec import TableSpec

trace_argument = click.argument("trace", type=click.Path(path_type=Path))
site_option = click.option("--site", help="One site alone.  [default: all]")


def chosen_tables(bundle: Bundle, site: str | None) -> list[TableSpec]:
    """Return the table of a site, or all; raises RequestError where that is none."""
    names = [table.site for table in bundle.manifest.tables]
    if not names:
        raise RequestError(f"bundle {bundle.path} has no tables")
    if site not in (None, *names):
        raise RequestError(f"bundle {bundle.path} has no site {site!r}, it has {names}")
    return [table for table in bundle.manifest.tables if site in (None, table.site)]


def only_table(bundle: Bundle, site: str | None) -> TableSpec:
    """Return the table of a site, or the only one; raises RequestError where there is none or more than one."""
    tables = chosen_tables(bundle, site)
    if len(tables) > 1:
        names = [table.site for table in tables]
        raise RequestError(f"bundle {bundle.path} has sites {names}; choose one with --site")
    return tables[0]
