"""``engram run``: continue one prompt."""

import json
from pathlib import Path
from typing import Any

import click

from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.options import (
    bundle_argument,
    executor_option,
    json_option,
    read_options,
    sampling_options,
    table_options,
    threads_option,
)
from engram_runtime.generation import Generation
from engram_runtime.llm import LLM
from engram_runtime.sampling import SamplingOptions


@click.command()
@bundle_argument
@click.argument("prompt")
@sampling_options
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@executor_option
@threads_option
@table_options
@json_option
def run(
    bundle: Path,
    prompt: str,
    max_tokens: int,
    stop: tuple[str, ...],
    executor: str,
    threads: int | None,
    tables: str,
    table_io: str,
    table_ram: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in BUNDLE."""
    options = SamplingOptions(**sampling)
    reading = read_options(tables, table_io, table_ram)
    with LLM(
        bundle, executor, threads=threads, tables_on=tables == "on", tables=reading, announce=announce_table
    ) as llm:
        for piece in llm.stream(prompt, max_tokens=max_tokens, sampling=options, stop=stop):
            if not as_json:
                click.echo(piece, nl=False)
        assert llm.last is not None
        if as_json:
            click.echo(
                json.dumps(
                    {
                        **generation_figures(llm.last),
                        "executor": executor,
                        "threads": llm.executor.threads,
                        "tables_on": tables == "on",
                        "tables": [choice.figures() for choice in llm.tables],
                    }
                )
            )
        else:
            click.echo()
            click.echo(summary(llm.last), err=True)


def generation_figures(generation: Generation) -> dict[str, Any]:
    """Return a generation as JSON values; times in milliseconds, rates in tokens per second."""
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "prefill_tok_s": round(generation.prefill_tok_s, 1),
        "decode_tok_s": round(generation.decode_tok_s, 1),
        "ttft_ms": round(generation.ttft_s * 1e3, 1),
    }


def summary(generation: Generation) -> str:
    """Return a generation's figures in one line."""
    return (
        f"[{len(generation.token_ids)} tokens, {generation.decode_tok_s:.1f} tok/s; prompt "
        f"{generation.prompt_tokens} tokens, {generation.prefill_tok_s:.1f} tok/s; "
        f"first token after {generation.ttft_s * 1e3:.0f} ms; {generation.finish_reason}]"
    )
