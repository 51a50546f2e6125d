"""``engram tables why``: the n-grams behind each token of a text, and what their rows did."""

import json
from functools import partial
from pathlib import Path

import click

from engram_runtime.bundle import Bundle
from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.options import (
    bundle_argument,
    executor_option,
    json_option,
    overlay_option,
    reading_options,
    target_option,
    threads_option,
)
from engram_runtime.executor import load_executor
from engram_runtime.lens.why import explain, explained_sites
from engram_runtime.lens.why_table import LEGEND, SORTS, chosen, json_values, lines
from engram_runtime.tables.options import TableOptions
from engram_runtime.tokenizer import TextTokenizer


@click.command()
@bundle_argument
@click.argument("text")
@click.option("--site", help="One site.  [default: all that read n-grams]")
@click.option("--top", type=click.IntRange(min=1), help="Only the tokens with the largest contributions.")
@click.option("--sort", type=click.Choice(list(SORTS)), default="position", show_default=True, help="Order of tokens.")
@executor_option
@threads_option
@target_option
@reading_options
@overlay_option
@json_option
def why(
    bundle: Path,
    text: str,
    site: str | None,
    top: int | None,
    sort: str,
    executor: str,
    threads: int | None,
    target: str | None,
    table_io: str,
    table_ram: int | None,
    overlays: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Show what BUNDLE's tables do to each token of TEXT: n-grams, their rows, gates and contributions."""
    reading = TableOptions(io=table_io, ram_bytes=table_ram, overlays=overlays)
    opened = Bundle.open(bundle)
    explained_sites(opened, site)
    tokenizer = TextTokenizer.load(bundle)
    loaded = load_executor(executor, opened, threads=threads, target=target)
    token_ids = tokenizer.encode(text)
    sites = explain(opened, loaded, token_ids, only=site, options=reading, announce=announce_table)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    shown = [(readings, chosen(readings, sort=sort, top=top)) for readings in sites]
    if as_json:
        facts = {"executor": executor, "overlays": list(map(str, overlays))}
        click.echo(json.dumps({**facts, "sites": [json_values(*part, decode) for part in shown]}))
        return
    for part in shown:
        for line in lines(*part, decode):
            click.echo(line)
    click.echo(LEGEND, err=True)
