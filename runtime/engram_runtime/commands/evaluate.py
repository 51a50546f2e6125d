"""``engram eval``: quality figures of a bundle."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.options import (
    bundle_argument,
    executor_option,
    json_option,
    overlay_option,
    read_options,
    table_options,
    threads_option,
)
from engram_runtime.errors import RequestError
from engram_runtime.llm import LLM
from engram_runtime.perplexity import perplexity


@click.group()
def evaluate() -> None:
    """Measure the quality of a bundle."""


@evaluate.command()
@bundle_argument
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text file to score.")
@click.option("--tokens", type=click.IntRange(min=2), default=2000, show_default=True, help="Tokens to score.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of context.")
@executor_option
@threads_option
@table_options
@overlay_option
@json_option
def ppl(
    bundle: Path,
    text: Path,
    tokens: int,
    window: int,
    executor: str,
    threads: int | None,
    tables: str,
    table_io: str,
    table_ram: int | None,
    overlays: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Print the perplexity of BUNDLE on a text."""
    reading = read_options(tables, table_io, table_ram, overlays)
    with LLM(
        bundle, executor, threads=threads, tables_on=tables == "on", tables=reading, announce=announce_table
    ) as llm:
        token_ids = llm.tokenizer.encode(read_text(text))[:tokens]
        size = min(window, llm.bundle.manifest.model.context_length)
        with click.progressbar(length=len(token_ids), label="scoring", file=sys.stderr) as bar:
            result = perplexity(llm.session, token_ids, window=size, progress=bar.update)
        chosen = [choice.figures() for choice in llm.tables]
    if as_json:
        report = {"perplexity": asdict(result), "executor": executor, "window": size}
        read = {"tables_on": tables == "on", "tables": chosen, "overlays": list(map(str, overlays))}
        click.echo(json.dumps({**report, **read}))
    else:
        click.echo(f"perplexity {result.value:.4f} ± {result.error:.4f} over {result.tokens} tokens, {executor}")


def read_text(path: Path) -> str:
    """Read a UTF-8 text; raises RequestError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"text {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"text {path} is not UTF-8 at byte {error.start}; convert it") from error
