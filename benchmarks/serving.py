"""Texts that are generated side by side by the serving engine, against one after the other by LLM.stream.

    python benchmarks/serving.py build/demo.engram --json build/serving.json

Every round takes each number of texts in turn, so other processes slow them alike; ratios are taken round by round. All
texts are submitted at once, have prompts of their own and all of their tokens, as end tokens end none. The seconds of
decoding are those from the first token of the first text to the last of all; of one text alone, those from its first
token on.
"""

import itertools
import json
import os
import platform
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_runtime import LLM, Generation, SamplingOptions
from engram_runtime.drafting.options import DRAFTERS, NONE, DraftOptions
from engram_runtime.errors import VerificationError
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.events import Event, Finished, Token
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.request import TextRequest

HEADS = ("texts", "tok/s of all", "over LLM.stream", "least to most", "tok/s of each", "TTFT ms")
Prompt = tuple[int, ...]


def prompts(vocab_size: int, count: int, tokens: int) -> list[Prompt]:
    """Return random ids that texts may have."""
    ids = np.random.default_rng(0).integers(1000, vocab_size, size=(count, tokens))
    return [tuple(row) for row in ids.tolist()]


class Round:
    """What an engine tells of texts that were submitted at once."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._ended = threading.Event()
        self.generations: list[Generation] = []

    def tell(self, index: int, event: Event) -> None:
        """See `engram_runtime.serving.engine_protocol.Tell`."""
        if isinstance(event, Token):
            return
        if not isinstance(event, Finished):
            raise event.error
        self.generations.append(event.generation)
        self._left -= 1
        if self._left == 0:
            self._ended.set()

    def wait(self) -> list[Generation]:
        """Return the generations once all have ended."""
        self._ended.wait()
        return self.generations


def together(
    engine: BundleEngine, texts: Sequence[Prompt], sampling: SamplingOptions, max_tokens: int
) -> dict[str, Any]:
    """Generate texts at once; returns their figures."""
    round_ = Round(len(texts))
    requests = [TextRequest(prompt_ids=prompt, max_tokens=max_tokens, sampling=sampling) for prompt in texts]
    engine.submit(requests, round_.tell)
    return figures(round_.wait(), max_tokens)


def figures(generations: Sequence[Generation], max_tokens: int) -> dict[str, Any]:
    """Return what texts that began together took; all have the tokens that were asked for."""
    if {len(each.token_ids) for each in generations} != {max_tokens}:
        raise VerificationError("a text has ended early; report a bug")
    began = min(each.ttft_s for each in generations)
    ended = max(each.ttft_s + each.decode_s for each in generations)
    return {
        "tok_s": (len(generations) * max_tokens - 1) / (ended - began),
        "each_tok_s": statistics.median(each.decode_tok_s for each in generations),
        "ttft_s": statistics.median(each.ttft_s for each in generations),
        "drafts": [each.drafts.figures() for each in generations if each.drafts],
    }


def report(rounds: Sequence[dict[int, dict[str, Any]]], alone: int) -> list[dict[str, Any]]:
    """Print a line of Markdown for each number of texts and return their figures."""
    click.echo("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    found = []
    for count in rounds[0]:
        every = [round_[count] for round_ in rounds]
        ratios = sorted(round_[count]["tok_s"] / round_[alone]["tok_s"] for round_ in rounds)
        medians = {name: statistics.median(each[name] for each in every) for name in ("tok_s", "each_tok_s", "ttft_s")}
        name = "LLM.stream" if count == alone else str(count)
        click.echo(
            f"| {name} | {medians['tok_s']:.1f} | {statistics.median(ratios):.3f} | "
            f"{ratios[0]:.3f} to {ratios[-1]:.3f} | {medians['each_tok_s']:.1f} | {1e3 * medians['ttft_s']:.1f} |"
        )
        found.append({"texts": count, "ratios": ratios, "rounds": every, **medians})
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--texts", "counts", type=int, multiple=True, default=[1, 2, 4, 8], show_default=True)
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--executor", default="tvm", show_default=True)
@click.option("--threads", type=int, help="Worker threads.  [default: the profile's]")
@click.option("--draft", "drafter", type=click.Choice(DRAFTERS), default=NONE, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the figures here.")
def main(
    bundle: Path,
    counts: tuple[int, ...],
    prompt_tokens: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    executor: str,
    threads: int | None,
    drafter: str,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Measure BUNDLE."""
    sampling = SamplingOptions(temperature=temperature, top_p=top_p, seed=0)
    drafts, options = DraftOptions(drafter=drafter), EngineOptions(slots=max(counts))
    with (
        LLM(bundle, executor, threads=threads, drafts=drafts) as llm,
        open_engine(bundle, executor, threads=threads, drafts=drafts, options=options) as engine,
    ):
        llm.tokenizer.eos_token_ids = engine.tokenizer.eos_token_ids = frozenset()
        click.echo(
            f"{platform.machine()}, {os.cpu_count()} CPUs, {llm.executor.threads} threads, load average "
            f"{os.getloadavg()[0]:.2f}; {prompt_tokens} tokens of prompt, {max_tokens} of each text, temperature "
            f"{temperature}\n"
        )
        texts = iter(prompts(llm.tokenizer.vocab_size, (1 + sum(counts)) * (rounds + 1), prompt_tokens))
        made = []
        for _ in range(rounds + 1):
            alone = llm.generate(next(texts), max_tokens=max_tokens, sampling=sampling)
            took = {0: figures([alone], max_tokens)}
            for count in counts:
                took[count] = together(engine, list(itertools.islice(texts, count)), sampling, max_tokens)
            made.append(took)
    found = report(made[1:], 0)  # the first round warms up
    if json_file is not None:
        json_file.write_text(json.dumps({"load_average": os.getloadavg(), "texts": found}, indent=1))


if __name__ == "__main__":
    main()
