"""Arguments that the commands on traces share."""

from pathlib import Path

import click

trace_argument = click.argument("trace", type=click.Path(path_type=Path))
site_option = click.option("--site", help="One site alone.  [default: all]")
