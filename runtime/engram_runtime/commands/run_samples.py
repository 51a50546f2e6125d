"""``engram run --n``: several samples of one prompt, or the best of them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import click

from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.errors import RequestError
from engram_runtime.llm import LLM
from engram_runtime.parallel.group import MOST_SEQUENCES
from engram_runtime.parallel.samples import SCORERS, Sample, best_of
from engram_runtime.sampling import SamplingOptions
from engram_runtime.terminal import show

Command = TypeVar("Command", bound=Callable[..., Any])


def samples_options(command: Command) -> Command:
    """Add ``--n`` and ``--best-of``."""
    best = click.option(
        "--best-of", type=click.Choice(list(SCORERS)), help="Print the sample with the highest score alone."
    )
    count = click.option(
        "--n",
        "count",
        type=click.IntRange(1, MOST_SEQUENCES),
        default=1,
        show_default=True,
        help="Draw so many samples at once; sample i has the seed --seed + i.",
    )
    return count(best(command))


def check_samples(count: int, best: str | None, drafts: DraftOptions) -> None:
    """Raise RequestError where there is nothing to choose from, or what samples are drawn without."""
    if count > 1 and drafts != NO_DRAFTS:
        raise RequestError("samples drawn together share their forward passes already; leave out --draft or --n")
    if best is not None and count == 1:
        raise RequestError(f"--best-of {best} chooses among samples; give --n 2 or more")


def print_samples(
    llm: LLM,
    prompt: str | Sequence[int],
    count: int,
    best: str | None,
    *,
    max_tokens: int,
    sampling: SamplingOptions,
    stop: Sequence[str],
    figures: Mapping[str, Any] | None,
) -> None:
    """Draw samples and print all of them, or the best one.

    Args:
        figures: of the run, printed with the samples as JSON; None prints text.
    """
    started = time.perf_counter()
    samples = sorted(
        llm.samples(prompt, count, max_tokens=max_tokens, sampling=sampling, stop=stop), key=lambda each: each.index
    )
    seconds = time.perf_counter() - started
    chosen = None if best is None else best_of(samples, SCORERS[best])
    if figures is not None:
        found = {"samples": [asdict(each) for each in samples], "best": None if chosen is None else chosen.index}
        click.echo(json.dumps({**found, "seconds": round(seconds, 3), **figures}))
        return
    for each in samples if chosen is None else [chosen]:
        show(each.text)
        click.echo(summary(each), err=True)
    tokens = sum(len(each.token_ids) for each in samples)
    click.echo(f"[{count} samples, {tokens} tokens in {seconds:.2f} s]", err=True)


def summary(sample: Sample) -> str:
    """Return a sample's figures in one line."""
    return (
        f"[sample {sample.index}, seed {sample.seed}: {len(sample.token_ids)} tokens, log-probability "
        f"{sample.logprob:.2f}; {sample.finish_reason}]"
    )
