"""Several samples of one prompt against one: time from the prompt on, and the memory their states take.

    python benchmarks/samples.py build/demo.engram --json build/samples.json

Numbers of samples run in turn, so other processes slow them alike; ratios are taken round by round. Every sample has
all of its tokens, as end tokens end none. One sample is a plain generation, without a group.

    python benchmarks/samples.py build/demo.engram --drafts --samples 3 --samples 5 --temperature 0.3 --max-tokens 128

With ``--drafts`` samples of real prompts, which end where they do, are drawn with drafts from siblings and without,
in turn; whether they are the same is checked.
"""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_runtime import LLM, SamplingOptions
from engram_runtime.errors import VerificationError
from engram_runtime.generation import decode_tokens
from engram_runtime.parallel.drafts import SiblingDrafter, SiblingLookup
from engram_runtime.parallel.group import Group
from engram_runtime.parallel.samples import Sample, draw_samples, seeded
from engram_runtime.sampling import make_sampler

PROMPTS = Path(__file__).parents[1] / "examples" / "retrofit" / "test_prompts.jsonl"
DOMAINS, TEXTS = ("chat", "code"), 4
HEADS = ("samples", "seconds", "over one", "least to most", "tok/s of all")


def prompt_of(llm: LLM, tokens: int) -> list[int]:
    """Return random ids that a text may have."""
    ids: list[int] = np.random.default_rng(0).integers(1000, llm.tokenizer.vocab_size, size=tokens).tolist()
    return ids


def seconds(llm: LLM, prompt: Sequence[int], count: int, max_tokens: int, sampling: SamplingOptions) -> float:
    """Time the prompt and ``count`` samples after it, from nothing."""
    llm.session.trim(len(llm.session))
    started = time.perf_counter()
    logits = llm.session.prefill(prompt)
    if count == 1:
        sample = make_sampler(sampling)
        made = [len(list(decode_tokens(llm.session, logits, sample, max_tokens=max_tokens, end_ids=())))]
    else:
        samples = draw_samples(llm.session, logits, llm.tokenizer, seeded(sampling, count), max_tokens=max_tokens)
        made = [len(each.token_ids) for each in samples]
    assert made == [max_tokens] * count
    return time.perf_counter() - started


def state_bytes(llm: LLM, prompt: Sequence[int], count: int, max_tokens: int) -> dict[str, float]:
    """Measure what the states of samples take of memory; pages mapped several times count once."""
    llm.session.trim(len(llm.session))
    llm.session.prefill(prompt)
    per_position = sum(state.nbytes for state in llm.session.states.values()) / llm.bundle.manifest.model.context_length
    before = physical_bytes()
    with Group(llm.session, count) as group:
        for token_id in range(1000, 1000 + max_tokens):
            group.step([token_id] * count)
        taken = physical_bytes() - before
    megabyte = 1e6
    return {
        "prompt_mb": round(len(prompt) * per_position / megabyte, 2),
        "added_mb": round(taken / megabyte, 2),
        "tokens_mb": round(count * max_tokens * per_position / megabyte, 2),
    }


def physical_bytes() -> int:
    """Return the memory of this process, a page that it maps several times once."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def report(counts: Sequence[int], times: dict[int, list[float]], max_tokens: int) -> list[dict[str, Any]]:
    """Print a line of Markdown for each number of samples and return their figures."""
    click.echo("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    found = []
    for count in counts:
        ratios = sorted(many / one for many, one in zip(times[count], times[1], strict=True))
        median_s = statistics.median(times[count])
        ratio = statistics.median(ratios)
        tok_s = count * max_tokens / median_s
        click.echo(f"| {count} | {median_s:.3f} | {ratio:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} | {tok_s:.1f} |")
        found.append({"samples": count, "seconds": times[count], "over_one": ratios, "tok_s": tok_s})
    return found


@dataclass(frozen=True, slots=True)
class NoDrafts:
    """A `SiblingDrafter` that drafts nothing."""

    def add(self, text: list[int], count: int) -> None:
        """Take no note."""

    def drafts(self, texts: Sequence[list[int]], most: Sequence[int], spare: int) -> list[list[int]]:
        """Return none."""
        return [[] for _ in texts]


def drawn(
    llm: LLM, prompt: Sequence[int], each: Sequence[SamplingOptions], max_tokens: int, drafter: SiblingDrafter
) -> tuple[float, list[Sample]]:
    """Draw samples after a prompt; returns the seconds from its end on, and them."""
    llm.session.trim(len(llm.session))
    logits = llm.session.prefill(prompt)
    started = time.perf_counter()
    samples = list(draw_samples(llm.session, logits, llm.tokenizer, each, max_tokens=max_tokens, drafter=drafter))
    seconds = time.perf_counter() - started
    return seconds, sorted(samples, key=lambda sample: sample.index)


def drafted_ratio(llm: LLM, prompt: Sequence[int], each: Sequence[SamplingOptions], max_tokens: int) -> float:
    """Return the seconds without drafts over those with drafts from siblings."""
    plain_s, plain = drawn(llm, prompt, each, max_tokens, NoDrafts())
    drafted_s, drafted = drawn(llm, prompt, each, max_tokens, SiblingLookup())
    if plain != drafted:
        raise VerificationError("samples with drafts are not those without; report a bug")
    return plain_s / drafted_s


def compare_drafts(
    llm: LLM, counts: Sequence[int], max_tokens: int, sampling: SamplingOptions, rounds: int
) -> list[dict[str, Any]]:
    """Print a line of Markdown for each kind of text and number of samples and return their figures."""
    lines = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    click.echo("| text | samples | without over with drafts | least to most of texts |\n|---|---|---|---|")
    found = []
    for domain, count in itertools.product(DOMAINS, counts):
        texts = [line["text"] for line in lines if line["domain"] == domain][:TEXTS]
        ratios = []
        for text in texts:
            prompt = llm.tokenizer.encode_chat([{"role": "user", "content": text}])
            each = seeded(sampling, count)
            ratios.append(statistics.median(drafted_ratio(llm, prompt, each, max_tokens) for _ in range(rounds)))
        median = statistics.median(ratios)
        click.echo(f"| {domain} | {count} | {median:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")
        found.append({"domain": domain, "samples": count, "speedup": ratios})
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--samples", "counts", type=int, multiple=True, default=[8], show_default=True)
@click.option("--prompt-tokens", default=512, show_default=True)
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.8, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--threads", type=int, help="Worker threads.  [default: the profile's]")
@click.option("--rounds", default=7, show_default=True)
@click.option("--drafts", is_flag=True, help="Compare with drafts from siblings and without, on real prompts.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the figures here.")
def main(
    bundle: Path,
    counts: tuple[int, ...],
    prompt_tokens: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    threads: int | None,
    rounds: int,
    drafts: bool,
    json_file: Path | None,
) -> None:
    """Measure BUNDLE."""
    sampling = SamplingOptions(temperature=temperature, top_p=top_p, seed=0)
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    every = (1, *(count for count in counts if count > 1))
    with LLM(bundle, threads=threads) as llm:
        click.echo(
            f"{platform.machine()}, {os.cpu_count()} CPUs, {llm.executor.threads} threads, load average "
            f"{os.getloadavg()[0]:.2f}; {max_tokens} tokens of each sample at temperature {temperature}\n"
        )
        if drafts:
            compared = compare_drafts(llm, every[1:], max_tokens, sampling, rounds)
            keep(json_file, {"options": options, "drafts": compared})
            return
        llm.tokenizer.eos_token_ids = frozenset()
        prompt = prompt_of(llm, prompt_tokens)
        times: dict[int, list[float]] = {count: [] for count in every}
        for round_ in range(rounds + 1):  # the first one warms up
            for count in every:
                took = seconds(llm, prompt, count, max_tokens, sampling)
                if round_:
                    times[count].append(took)
        figures = report(every, times, max_tokens)
        memory = state_bytes(llm, prompt, max(every), max_tokens)
    click.echo(
        f"\nstates: {memory['prompt_mb']} MB of the prompt, {memory['added_mb']} MB more for {max(every)} samples, "
        f"whose own tokens take {memory['tokens_mb']} MB; load average {os.getloadavg()[0]:.2f}"
    )
    keep(json_file, {"options": options | {"prompt_tokens": prompt_tokens}, "samples": figures, "states": memory})


def keep(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures to a file where one is wanted."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
