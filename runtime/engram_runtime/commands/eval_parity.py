"""``engram eval parity``: how far executors are from one another, or from the checkpoint."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from engram_runtime.commands.eval_options import TextToScore, scoring_options, text_options, to_json, what_ran
from engram_runtime.commands.loading import Loading
from engram_runtime.commands.options import bundle_argument, json_option, on_or_off_option
from engram_runtime.commands.verify import checkpoint_parity
from engram_runtime.errors import RequestError
from engram_runtime.evaluation.parity import distances, logits_of
from engram_runtime.executor import EXECUTORS

CHECKPOINT, TVM = "checkpoint", "tvm"


@click.command()
@bundle_argument
@text_options(required=True)
@click.option(
    "--executors", metavar="A,B", help="The first one is what others are held against.  [default: tvm,onnxruntime]"
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Hold --executors, here tvm by default, against this checkpoint, run by transformers in float32.",
)
@on_or_off_option
@scoring_options
@json_option
def parity(
    bundle: Path,
    text: TextToScore,
    executors: str | None,
    against: Path | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Compare what BUNDLE says of a text on several executors, or beside its checkpoint.

    Told are the divergence (Kullback and Leibler, nats a token), how often both find the same token likeliest, the
    largest difference of two logits and what became of the perplexity. Two windows of logits are in memory at once, and
    the weights of each executor. A checkpoint has no tables unless its own code in transformers reads them.
    """
    names = _names(executors, against)
    if against is not None:
        checkpoint_parity().check_checkpoint(against)
    with contextlib.ExitStack() as opened:
        loadings = [_with_executor(loading, name) for name in names]
        llms = [opened.enter_context(each.load(bundle)) for each in loadings]
        model = llms[0].session.model
        windows = text.windows(llms[0].tokenizer, model.context_length)
        models = [(llm.executor.name, logits_of(llm.session)) for llm in llms]
        if against is not None:
            models.insert(0, (CHECKPOINT, checkpoint_parity().checkpoint_logits(against, model.vocab_size)))
        (reference, expected), *others = models
        with click.progressbar(length=windows.tokens, label="comparing", file=sys.stderr) as bar:
            compared = distances(expected, dict(others), windows, bar.update)
        ran = [what_ran(each, llm) for each, llm in zip(loadings, llms, strict=True)]
    found = {name: each.figures() for name, each in compared.items()}
    if as_json:
        click.echo(to_json({"reference": reference, "compared": found, "window": windows.size, "ran": ran}))
    else:
        click.echo("\n".join(line for name, figures in found.items() for line in _lines(name, reference, figures)))


def _with_executor(loading: Loading, name: str) -> Loading:
    """Return it for an executor; a target is for the one that runs compiled libraries."""
    return dataclasses.replace(loading, executor=name, target=loading.target if name == TVM else None)


def _names(executors: str | None, against: Path | None) -> list[str]:
    """Return the executors to run, each once but the first, which may be held against itself."""
    names = (executors or (TVM if against else ",".join(EXECUTORS))).split(",")
    if unknown := [name for name in names if name not in EXECUTORS]:
        raise RequestError(f"--executors names {unknown[0]!r}, expected of {', '.join(EXECUTORS)}")
    if against is None and len(names) < 2:
        raise RequestError(f"--executors is {names[0]} alone; give another one to compare, or --against CHECKPOINT")
    first, *others = names
    return [first, *dict.fromkeys(others)]


def _lines(name: str, reference: str, figures: dict[str, Any]) -> list[str]:
    return [
        f"{name} against {reference}, {figures['tokens']} tokens",
        f"  divergence {figures['divergence']:.3g} nats a token, {figures['max_divergence']:.3g} at most",
        f"  same likeliest token {figures['top1_agreement']:.2%}",
        f"  largest difference of a logit {figures['max_abs']:.3g}, the median token's {figures['median_abs']:.3g}",
        f"  perplexity {figures['perplexity'].value:.4f} for {figures['reference_perplexity'].value:.4f}, "
        f"{figures['perplexity_ratio']:.5f} times",
    ]
