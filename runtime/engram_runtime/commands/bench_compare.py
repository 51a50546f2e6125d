"""``engram bench compare``: what became faster or slower from one report to the next."""

import json
from pathlib import Path

import click

from engram_runtime.bench.compare import comparison, markdown, read_report
from engram_runtime.commands.options import json_option

report_argument = click.Path(path_type=Path)


@click.command()
@click.argument("first", metavar="A.json", type=report_argument)
@click.argument("second", metavar="B.json", type=report_argument)
@json_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Compare two reports of engram bench --json, figure by figure.

    Each ratio is B's rounds over A's with its 95 % interval (Hodges and Lehmann, by ranks), for which four rounds of
    each are the least. What else differs, such as threads, processor or load, is told first.
    """
    before, after = read_report(first), read_report(second)
    if as_json:
        click.echo(json.dumps({"a": str(first), "b": str(second), **comparison(before, after)}))
    else:
        click.echo(markdown((str(first), str(second)), before, after))
