"""``engram eval ppl``: perplexity on a text."""

import sys
from pathlib import Path
from typing import Any

import click

from engram_runtime.commands.eval_options import TextToScore, scoring_options, text_options, to_json, what_ran
from engram_runtime.commands.loading import Loading
from engram_runtime.commands.options import bundle_argument, executor_option, json_option, on_or_off_option
from engram_runtime.evaluation.texts import bits_per_byte, perplexity, text_losses


@click.command()
@bundle_argument
@text_options(required=True)
@executor_option
@on_or_off_option
@scoring_options
@json_option
def ppl(bundle: Path, text: TextToScore, loading: Loading, as_json: bool) -> None:
    """Print the perplexity of BUNDLE on a text, and the bits a byte of it takes.

    Windows are sequences of their own, all of whose tokens but the first are scored. The interval is that of blocks of
    128 tokens of texts like this one.
    """
    with loading.load(bundle) as llm:
        windows = text.windows(llm.tokenizer, llm.session.model.context_length)
        with click.progressbar(length=windows.tokens, label="scoring", file=sys.stderr) as bar:
            losses = text_losses(llm.session, windows, bar.update)
        ran = what_ran(loading, llm)
    found = perplexity(losses)
    bits = bits_per_byte(losses, windows)
    if as_json:
        facts: dict[str, Any] = {"scored_tokens": len(losses), "bytes": int(windows.num_bytes.sum())}
        click.echo(to_json({"perplexity": found, "bits_per_byte": bits, **facts, "window": windows.size, **ran}))
    else:
        click.echo(f"perplexity {found:.4f}, bits per byte {bits:.4f}, of {len(losses)} tokens, {loading.executor}")
