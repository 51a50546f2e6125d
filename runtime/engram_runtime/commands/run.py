"""``engram run``: continue one prompt."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.options import (
    bundle_argument,
    draft_options,
    executor_option,
    json_option,
    overlay_option,
    read_drafts,
    read_options,
    sampling_options,
    table_options,
    threads_option,
)
from engram_runtime.commands.run_samples import check_samples, print_samples, samples_options
from engram_runtime.generation import Generation
from engram_runtime.llm import LLM
from engram_runtime.sampling import SamplingOptions
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.policy import TableChoice


@click.command()
@bundle_argument
@click.argument("prompt")
@sampling_options
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@draft_options
@samples_options
@executor_option
@threads_option
@table_options
@overlay_option
@json_option
def run(
    bundle: Path,
    prompt: str,
    max_tokens: int,
    stop: tuple[str, ...],
    draft: str,
    draft_k: int | None,
    count: int,
    best_of: str | None,
    executor: str,
    threads: int | None,
    tables: str,
    table_io: str,
    table_ram: int | None,
    overlays: tuple[Path, ...],
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in BUNDLE."""
    options = SamplingOptions(**sampling)
    check_samples(count, best_of, draft)
    reading = read_options(tables, table_io, table_ram, overlays)
    with LLM(
        bundle,
        executor,
        threads=threads,
        tables_on=tables == "on",
        tables=reading,
        drafts=read_drafts(draft, draft_k),
        announce=announce_table,
    ) as llm:
        if count > 1:
            figures = {"executor": executor, "threads": llm.executor.threads, "tables_on": tables == "on"}
            print_samples(
                llm,
                prompt,
                count,
                best_of,
                max_tokens=max_tokens,
                sampling=options,
                stop=stop,
                figures=figures if as_json else None,
            )
            return
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
                        "tables": [table_figures(choice, llm.last.tables) for choice in llm.tables],
                        "overlays": list(map(str, overlays)),
                    }
                )
            )
        else:
            click.echo()
            click.echo(summary(llm.last), err=True)


def generation_figures(generation: Generation) -> dict[str, Any]:
    """Return a generation as JSON values; times in milliseconds, rates in tokens per second."""
    drafts = {} if generation.drafts is None else {"drafts": generation.drafts.figures()}
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "prefill_tok_s": round(generation.prefill_tok_s, 1),
        "decode_tok_s": round(generation.decode_tok_s, 1),
        "ttft_ms": round(generation.ttft_s * 1e3, 1),
        **drafts,
    }


def table_figures(choice: TableChoice, asked: Mapping[str, TableCounters]) -> dict[str, Any]:
    """Return how a table is read and what a request asked of it, as JSON values; times in milliseconds."""
    counts = asdict(asked[choice.site])
    wait_s = counts.pop("wait_s")
    return {**choice.figures(), **counts, "wait_ms": round(wait_s * 1e3, 3)}


def summary(generation: Generation) -> str:
    """Return a generation's figures in one line."""
    return (
        f"[{len(generation.token_ids)} tokens, {generation.decode_tok_s:.1f} tok/s; prompt "
        f"{generation.prompt_tokens} tokens, {generation.prefill_tok_s:.1f} tok/s; "
        f"first token after {generation.ttft_s * 1e3:.0f} ms; {_drafts(generation)}{_cold_rows(generation)}"
        f"{generation.finish_reason}]"
    )


def acceptance(generation: Generation) -> str:
    """Return the share of right drafts by position, in one line."""
    if generation.drafts is None or not generation.drafts.drafted:
        return "nothing was drafted"
    shares = ", ".join(f"{share:.0%}" for share in generation.drafts.acceptance)
    return f"{generation.drafts.drafter} drafts right, one by one: {shares}"


def _drafts(generation: Generation) -> str:
    if (drafts := generation.drafts) is None:
        return ""
    used, ready = (
        sum(getattr(counters, name) for counters in generation.tables.values())
        for name in ("early_used", "early_ready")
    )
    rows = f"{ready} of {used} rows of drafts ready in time; " if used else ""
    counts = f"{sum(drafts.accepted)} of {sum(drafts.drafted)} drafts right"
    return f"{drafts.tokens_per_forward:.2f} tokens a forward pass, {counts}; {rows}"


def _cold_rows(generation: Generation) -> str:
    cold = sum(counters.cold for counters in generation.tables.values())
    wait_s = sum(counters.wait_s for counters in generation.tables.values())
    return f"{cold} rows waited for, {wait_s * 1e3:.0f} ms; " if cold else ""
