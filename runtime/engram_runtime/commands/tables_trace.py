"""``engram tables trace``: which rows a text reads."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import bundle_argument, force_option, json_option
from engram_runtime.errors import RequestError
from engram_runtime.keyers import NO_ROW
from engram_runtime.lens.recording import record_trace, text_token_ids
from engram_runtime.lens.trace import Trace
from engram_runtime.lens.trace_file import MAX_TOKENS, write_trace
from engram_runtime.new_file import check_place
from engram_runtime.tokenizer import TextTokenizer


@click.command()
@bundle_argument
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text file to read.")
@click.option(
    "--tokens", type=click.IntRange(1, MAX_TOKENS), default=MAX_TOKENS, show_default=True, help="Most tokens to take."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@force_option
@json_option
def trace(bundle: Path, text: Path, tokens: int, out: Path, force: bool, as_json: bool) -> None:
    """Record which rows of its tables a text reads.

    The text is one sequence, whatever the model's context; no graph of BUNDLE is run and no row is read.
    """
    check_place(out, replace=force)
    opened = Bundle.open(bundle)
    if not opened.manifest.tables:
        raise RequestError(f"bundle {bundle} has no tables, so there is nothing to record")
    token_ids = _token_ids(opened, text, tokens)
    ids = len(token_ids) * sum(table.keyer.columns for table in opened.manifest.tables)
    name, command = map(_readable, (text.name, shlex.join(["engram", *sys.argv[1:]])))
    with click.progressbar(length=ids, label="hashing", file=sys.stderr) as bar:
        recorded = record_trace(opened, token_ids, text=name, command=command, progress=bar.update)
    write_trace(out, recorded, replace=force)
    facts = _facts(recorded, out)
    click.echo(json.dumps(facts) if as_json else _text(facts))


def _token_ids(bundle: Bundle, text: Path, most: int) -> NDArray[np.int64]:
    tokenizer = TextTokenizer.load(bundle.path)
    size = text.stat().st_size if text.is_file() else 0
    with click.progressbar(length=size, label="tokenising", file=sys.stderr) as bar:
        return text_token_ids(tokenizer, text, most, bar.update)


def _readable(text: str) -> str:
    """Return a text with question marks for bytes of file names that are not UTF-8, which no trace can hold."""
    return text.encode(errors="replace").decode()


def _facts(trace: Trace, out: Path) -> dict[str, Any]:
    sites = []
    for site in trace.sites:
        row_ids, counts = trace.counts(site)
        sites.append(
            {
                "site": site.site,
                "reads": int(counts.sum()),
                "distinct": len(row_ids),
                "rows": site.num_rows,
                "without_row": int((trace.row_ids[site.site][:, 0] == NO_ROW).sum()),
            }
        )
    return {"file": str(out), "bytes": out.stat().st_size, "tokens": trace.tokens, "sites": sites}


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['file']}: {facts['tokens']:,} tokens, {facts['bytes']:,} bytes"]
    for site in facts["sites"]:
        lines.append(f"  {site['site']}: {site['reads']:,} reads of {site['distinct']:,} of {site['rows']:,} rows")
    return "\n".join(lines)
