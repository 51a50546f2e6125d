"""``engram verify``: hold a bundle against its digests, its golden values and, if asked, its checkpoint."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from engram_runtime.bundle import Bundle
from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.options import (
    bundle_argument,
    executor_option,
    json_option,
    read_options,
    table_options,
    target_option,
    threads_option,
    trust_options,
)
from engram_runtime.draft_head import DraftHead
from engram_runtime.errors import RequestError, TargetError
from engram_runtime.executor import load_executor
from engram_runtime.golden import Golden, check_drafts, check_logits, check_tables
from engram_runtime.library import find_library, verify_library
from engram_runtime.manifest import DECODER
from engram_runtime.session import Session, close_sites, open_sites
from engram_runtime.tables.options import TableOptions
from engram_runtime.trust.levels import Trust

CHECKPOINT_PARITY = "engram_export.parity"  # needs the export extra; only asked for with --against
DECODER_OPTIONS = ("executor", "threads", "target", "tables")


@click.command()
@bundle_argument
@executor_option
@threads_option
@target_option
@click.option(
    "--against", type=click.Path(path_type=Path), help="Checkpoint to compare logits with, run by transformers."
)
@click.option("--text", type=click.Path(path_type=Path), help="Text to compare on.  [default: a built-in one]")
@click.option("--tokens", type=click.IntRange(min=2), default=2000, show_default=True, help="Tokens to compare on.")
@table_options
@trust_options
@json_option
def verify(
    bundle: Path,
    executor: str,
    threads: int | None,
    target: str | None,
    against: Path | None,
    text: Path | None,
    tokens: int,
    tables: str,
    table_io: str,
    table_ram: int | None,
    trust: Trust,
    as_json: bool,
) -> None:
    """Check BUNDLE: every file's digest, the golden rows, logits and drafts, and a checkpoint with --against.

    Without a decoder there are rows alone to check: graphs of sites are not run.
    """
    if against is None and text is not None:
        raise RequestError("--text is compared on with --against CHECKPOINT only; give both or neither")
    reading = read_options(tables, table_io, table_ram)
    opened = Bundle.open(bundle, trust)
    tables_only = DECODER not in opened.manifest.graphs and against is None
    if tables_only:
        _refuse_decoder_options()
    if against is None and tables == "off":
        raise RequestError("golden values are those with tables on, --tables off acts on --against CHECKPOINT only")
    if against is not None:
        checkpoint_parity().check_checkpoint(against)
    _check_digests(opened)
    if tables_only:
        _check_rows(opened, Golden.read(opened), reading)
        sites = "not run" if opened.manifest.graphs else "none"
        report: dict[str, Any] = {"digests": "ok", "tables": "ok", "decoder": "none", "sites": sites}
        _print(report, as_json=as_json)
        return
    if executor == "tvm":
        verify_library(*find_library(opened, target))  # before any of its machine code is loaded
    loaded = load_executor(executor, opened, threads=threads, target=target)
    golden = Golden.read(opened)
    _check_rows(opened, golden, reading)
    with Session.open(opened, loaded, options=reading) as session:
        report = {"digests": "ok", "tables": "ok", "executor": executor}
        report["golden"] = check_logits(golden, session)
        if golden.draft_argmax:
            report["golden drafts"] = check_drafts(golden, DraftHead(opened, loaded), session.hidden)
    if against is not None:
        with Session.open(opened, loaded, options=reading, tables_on=tables == "on") as session:
            report["against tables"] = tables
            report["against"] = checkpoint_parity().compare_with_transformers(session, opened, against, text, tokens)
    _print(report, as_json=as_json)


def _print(report: dict[str, Any], *, as_json: bool) -> None:
    """Print what was found; wrong digests and golden values were errors before, other figures are for the reader."""
    click.echo(
        json.dumps(report) if as_json else f"{_table(report)}\nfiles and golden values are as they were exported"
    )


def _refuse_decoder_options() -> None:
    context = click.get_current_context()
    for name in DECODER_OPTIONS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise RequestError(
                f"--{name} is for running a decoder, this bundle holds tables and sites only; leave it out"
            )


def _check_digests(bundle: Bundle) -> None:
    total = sum(entry.bytes for entry in bundle.manifest.files)
    with click.progressbar(length=total, label="digests", file=sys.stderr) as bar:
        bundle.verify_digests(bar.update)


def _check_rows(bundle: Bundle, golden: Golden, reading: TableOptions) -> None:
    sites = open_sites(bundle, reading, announce=announce_table)
    try:
        check_tables(golden, sites)
    finally:
        close_sites(sites)


def checkpoint_parity() -> Any:
    """Return the module of the export package that runs checkpoints; raises TargetError where it isn't installed."""
    try:
        return importlib.import_module(CHECKPOINT_PARITY)
    except ModuleNotFoundError as error:
        raise TargetError(f"--against needs {error.name}: pip install 'engram-edge[export]' transformers") from error


def _table(report: dict[str, Any]) -> str:
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{key} {name.replace('_', ' ')}: {figure}" for name, figure in value.items()]
        else:
            lines.append(f"{key}: {value}")
    return "\n".join(lines)
