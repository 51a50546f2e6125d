"""``engram run``: continue one prompt."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from engram_runtime.commands.loading import Loading, loading_options, trace_option
from engram_runtime.commands.options import bundle_argument, json_option, sampling_options
from engram_runtime.commands.run_samples import check_samples, print_samples, samples_options
from engram_runtime.errors import RequestError
from engram_runtime.generation import Generation
from engram_runtime.llm import LLM
from engram_runtime.sampling import SamplingOptions
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.policy import TableChoice
from engram_runtime.terminal import show


@click.command()
@bundle_argument
@click.argument("prompt")
@click.option(
    "--chat", "in_chat", is_flag=True, help="PROMPT is a user's message: put it into the model's chat template."
)
@sampling_options
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@samples_options
@loading_options
@trace_option
@json_option
def run(
    bundle: Path,
    prompt: str,
    in_chat: bool,
    max_tokens: int,
    stop: tuple[str, ...],
    count: int,
    best_of: str | None,
    loading: Loading,
    trace: Path | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in BUNDLE."""
    request: dict[str, Any] = {"max_tokens": max_tokens, "sampling": SamplingOptions(**sampling), "stop": stop}
    check_samples(count, best_of, loading.drafts)
    if count > 1 and trace is not None:
        raise RequestError("samples drawn together are not traced; leave out --trace or --n")
    with loading.load(bundle, trace) as llm:
        asked = llm.tokenizer.encode_chat([{"role": "user", "content": prompt}]) if in_chat else prompt
        figures = loading.figures(llm)
        if count > 1:
            print_samples(llm, asked, count, best_of, figures=figures if as_json else None, **request)
        elif as_json:
            made = llm.generate(asked, **request)
            click.echo(json.dumps({**generation_figures(made), **figures, **reading_figures(llm, made, loading)}))
        else:
            _print_text(llm, asked, request)


def _print_text(llm: LLM, prompt: str | Sequence[int], request: Mapping[str, Any]) -> None:
    for piece in llm.stream(prompt, **request):
        show(piece, nl=False)
    assert llm.last is not None
    click.echo()
    click.echo(summary(llm.last), err=True)


def generation_figures(generation: Generation) -> dict[str, Any]:
    """Return a generation as JSON values; times in milliseconds, rates in tokens per second."""
    experts = generation.experts_per_forward
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "prefill_tok_s": round(generation.prefill_tok_s, 1),
        "decode_tok_s": round(generation.decode_tok_s, 1),
        "ttft_ms": round(generation.ttft_s * 1e3, 1),
        **({} if experts is None else {"experts_per_forward": round(experts, 2)}),
        **({} if generation.drafts is None else {"drafts": generation.drafts.figures()}),
    }


def reading_figures(llm: LLM, generation: Generation, loading: Loading) -> dict[str, Any]:
    """Return how tables are read, and what a generation asked of them, as JSON values."""
    return {
        "tables": [table_figures(choice, generation.tables) for choice in llm.tables],
        "overlays": list(map(str, loading.tables.overlays)),
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
        f"first token after {generation.ttft_s * 1e3:.0f} ms; {_drafts(generation)}{_experts(generation)}"
        f"{_cold_rows(generation)}{generation.finish_reason}]"
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


def _experts(generation: Generation) -> str:
    experts = generation.experts_per_forward
    return "" if experts is None else f"{experts:.1f} experts a forward pass; "


def _cold_rows(generation: Generation) -> str:
    cold = sum(counters.cold for counters in generation.tables.values())
    wait_s = sum(counters.wait_s for counters in generation.tables.values())
    return f"{cold} rows waited for, {wait_s * 1e3:.0f} ms; " if cold else ""
