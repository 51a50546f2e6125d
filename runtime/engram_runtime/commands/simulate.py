"""``engram simulate``: what an accelerator would take of a bundle's linear layers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_runtime.bundle import Bundle
from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.options import bundle_argument, json_option, read_options, table_options, threads_option
from engram_runtime.errors import RequestError
from engram_runtime.executor import load_executor
from engram_runtime.library import NPU, library_device
from engram_runtime.npu.report import phase_figures, phase_lines
from engram_runtime.session import Session


@click.command()
@bundle_argument
@click.option("--target", required=True, metavar="NAME", help="Target with an accelerator that it was compiled for.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Random ones.")
@click.option("--tokens", type=click.IntRange(min=1), default=8, show_default=True, help="To decode after them.")
@threads_option
@table_options
@json_option
def simulate(
    bundle: Path,
    target: str,
    prompt_tokens: int,
    tokens: int,
    threads: int | None,
    tables: str,
    table_io: str,
    table_ram: int | None,
    as_json: bool,
) -> None:
    """Count the cycles and bytes of BUNDLE's linear layers on a target's accelerator, for a prompt and decoding.

    The accelerator is simulated; its results are the same, bit for bit, as those of this machine's library.
    """
    reading = read_options(tables, table_io, table_ram)
    opened = Bundle.open(bundle)
    if (device := library_device(opened, target)) != NPU:
        raise RequestError(
            f"target {target} runs on {device}, without an accelerator to simulate; measure it with: "
            f"engram bench {bundle} --target {target}"
        )
    executor: Any = load_executor("tvm", opened, threads=threads, target=target)
    geometry, ledger, phases = executor.geometry, executor.ledger, {}
    token_ids = np.random.default_rng(0).integers(0, opened.manifest.model.vocab_size, size=prompt_tokens).tolist()
    with Session.open(opened, executor, options=reading, tables_on=tables == "on", announce=announce_table) as session:
        token_id = int(session.prefill(token_ids).argmax())
        phases["prompt"] = phase_figures(ledger, geometry, prompt_tokens)
        ledger.clear()
        for _ in range(tokens):
            token_id = int(session.decode([token_id])[-1].argmax())
        phases["decode"] = phase_figures(ledger, geometry, tokens)
    if as_json:
        facts = {"target": target, "accelerator": geometry.accelerator, "geometry": asdict(geometry)}
        click.echo(json.dumps({**facts, **phases}))
        return
    sizes = ", ".join(f"{name} {value:,}" for name, value in asdict(geometry).items())
    click.echo(f"{target}: {geometry.accelerator}, {sizes}; simulated\n")
    for name, found in phases.items():
        click.echo("\n".join(phase_lines(name, found)) + "\n")
