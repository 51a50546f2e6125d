"""``engram bench tables``: what look-ups in a bundle's tables cost here, beside raw reads of the same files."""

import json
import os
import sys
from pathlib import Path

import click

from engram_runtime.bench.tables import STATES, TableBench, TableSettings
from engram_runtime.bench.tables_report import markdown, table_report
from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import bundle_argument, executor_option, json_option
from engram_runtime.errors import RequestError
from engram_runtime.sizes import parse_size
from engram_runtime.tables.options import AUTO, TABLE_IO, TableOptions


@click.command()
@bundle_argument
@executor_option
@click.option("--tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="Of a chunk.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--depth", type=click.IntRange(min=1), default=64, show_default=True, help="Of a chunk's raw reads.")
@click.option("--table-io", type=click.Choice(TABLE_IO), default=AUTO, show_default=True)
@click.option(
    "--memory", type=parse_size, metavar="SIZE", help="Of the capped process.  [default: a tenth of the table]"
)
@json_option
def tables(
    bundle: Path, executor: str, tokens: int, rounds: int, depth: int, table_io: str, memory: int | None, as_json: bool
) -> None:
    """Measure look-ups in BUNDLE's tables: warm, cold, and in a process whose memory is capped."""
    specs = Bundle.open(bundle).manifest.tables
    if not specs:
        raise RequestError(f"bundle {bundle} has no tables; measure it with: engram bench {bundle}")
    settings = TableSettings(tokens=tokens, rounds=rounds, depth=depth, cap_bytes=memory)
    before = os.getloadavg()[0]
    steps = len(specs) * len(STATES) * (1 + rounds)
    with click.progressbar(length=steps, label="rounds", file=sys.stderr) as bar:
        measuring = TableBench(
            model=str(bundle),
            executor=executor,
            options=TableOptions(io=table_io),
            settings=settings,
            progress=bar.update,
        )
        results = [measuring.measure(spec) for spec in specs]
    found = table_report(results, settings, (before, os.getloadavg()[0]))
    click.echo(json.dumps(found) if as_json else markdown(found))
