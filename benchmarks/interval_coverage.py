"""How often the interval of `engram eval ppl` on a stretch of a long text holds the whole text's mean loss.

    python benchmarks/interval_coverage.py build/demo.engram

Beside it stands the interval that takes tokens as independent.
"""

import math
import pydoc_data.topics
import sys
from pathlib import Path

import click
import numpy as np

from engram_runtime.evaluation.intervals import NORMAL_975
from engram_runtime.evaluation.texts import Windows, mean_of_tokens, text_losses
from engram_runtime.llm import LLM

STRETCHES = 400


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", default=80_000, show_default=True)
def main(bundle: Path, tokens: int) -> None:
    """Score Python's language reference with BUNDLE and draw stretches of it."""
    topics: dict[str, str] = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    with LLM(bundle) as llm:
        windows = Windows.of(llm.tokenizer, text, tokens=tokens, window=512)
        with click.progressbar(length=windows.tokens, label="scoring", file=sys.stderr) as bar:
            losses = text_losses(llm.session, windows, bar.update)
    mean, rng = losses.mean(), np.random.default_rng(0)
    for length in (500, 1000, 2000, 8000):
        blocks = independent = 0
        for start in rng.integers(0, len(losses) - length, size=STRETCHES):
            stretch = losses[start : start + length]
            blocks += not mean_of_tokens(stretch).excludes(mean)
            independent += abs(stretch.mean() - mean) <= NORMAL_975 * stretch.std() / math.sqrt(length)
        click.echo(
            f"{length} tokens: {blocks / STRETCHES:.0%} of {STRETCHES} intervals hold it, taking tokens as independent "
            f"{independent / STRETCHES:.0%}"
        )


if __name__ == "__main__":
    main()
