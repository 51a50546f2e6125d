"""``engram bench``: prefill and decode speed, executors in turn within one run."""

import json
import os
import sys
from pathlib import Path

import click

from engram_runtime.bench import BenchResult, measure
from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import bundle_argument, json_option, tables_option, threads_option
from engram_runtime.executor import EXECUTORS


@click.command()
@bundle_argument
@click.option(
    "--executor",
    "executors",
    type=click.Choice(list(EXECUTORS)),
    multiple=True,
    default=["tvm"],
    show_default=True,
    help="May be given several times: they then take turns.",
)
@threads_option
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@tables_option
@json_option
def bench(
    bundle: Path,
    executors: tuple[str, ...],
    threads: int | None,
    prompt_tokens: int,
    decode_tokens: int,
    rounds: int,
    tables: str,
    as_json: bool,
) -> None:
    """Measure BUNDLE; figures are medians over the rounds."""
    before = os.getloadavg()[0]
    with click.progressbar(length=rounds * len(executors), label="rounds", file=sys.stderr) as bar:
        results = measure(
            Bundle.open(bundle),
            executors,
            threads=threads,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            rounds=rounds,
            tables_on=tables == "on",
            progress=lambda: bar.update(1),
        )
    if as_json:
        figures = {result.executor: result.to_dict() for result in results}
        click.echo(json.dumps({"load_average": before, "executors": figures}))
    else:
        click.echo(f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after")
        for result in results:
            click.echo(_line(result, prompt_tokens, decode_tokens))


def _line(result: BenchResult, prompt_tokens: int, decode_tokens: int) -> str:
    experts = "" if (size := result.expert_bytes_per_token) is None else f"   experts {size:,} bytes a token"
    return (
        f"{result.executor:12} {result.threads} threads   load {result.load_s * 1e3:6.0f} ms   "
        f"prefill {prompt_tokens} tokens {result.prefill_tok_s:7.1f} tok/s   "
        f"decode {decode_tokens} tokens {result.decode_tok_s:7.1f} tok/s{experts}"
    )
