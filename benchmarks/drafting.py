"""Drafted decoding against plain decoding: ratios of speed by kind of text, and on the worst of a mixed set.

    python benchmarks/drafting.py build/demo.engram --json build/drafting.json

Every round takes each text with each way in turn, one right after the other, and compares their seconds from the end of
the prompt to the last token; whether the tokens are the same is checked. A way keeps its schedule from text to text as
a conversation does, and begins with one text that isn't counted. "plain, again" is plain decoding a second time: what
it differs from the first by is noise, and so is as much of the others.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from engram_runtime import LLM, Generation
from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.errors import VerificationError
from engram_runtime.manifest import DRAFT_HEAD

PLAIN, AGAIN = "plain", "plain, again"
SHORT = 16  # tokens; of texts up to there the few first ones, which nobody could draft for, are most
PROMPTS = Path(__file__).parents[1] / "examples" / "retrofit" / "test_prompts.jsonl"
COPY, MIXED = "copy", "mixed"
DOMAINS = ("chat", "definitions", "code", "prose")
MIXED_PROMPTS, COPIED_CHARACTERS = 30, 700
SETTLE_S = 0.02  # idle threads of the one before still spin for some milliseconds


@dataclass(slots=True)
class Text:
    """A prompt and what its rounds took.

    Attributes:
        seconds: by way, of each round.
        figures: by way, of drafts in the last round.
    """

    kind: str
    prompt: str
    tokens: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def ratio(self, way: str) -> float:
        """Return the median over rounds of plain decoding's seconds over those of a way."""
        pairs = zip(self.seconds[PLAIN], self.seconds[way], strict=True)
        return statistics.median(plain / drafted for plain, drafted in pairs)


def turn(prompt: str) -> str:
    """Return a prompt as the user's turn of a conversation."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def copy_texts() -> Iterator[Text]:
    """Yield tasks whose answers stand in the prompt: code of this repository to be repeated, once begun."""
    root = Path(__file__).parents[1] / "runtime" / "engram_runtime"
    for name in ("sizes.py", "hashing.py", "sampling.py", "site.py", "activity.py"):
        code = (root / name).read_text()[:COPIED_CHARACTERS]
        listing = f"```python\n{code}\n```\n"
        yield Text(COPY, turn(f"Repeat this file:\n{listing}") + f"{listing}\nOnce more:\n```python\n")


def domain_texts(each: int) -> list[Text]:
    """Return prompts of the domains that the draft head was tested on."""
    lines = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    return [
        Text(domain, turn(line["text"]) if line["chat"] else line["text"])
        for domain in DOMAINS
        for line in [line for line in lines if line["domain"] == domain][:each]
    ]


def mixed_texts(copies: Sequence[Text], others: Sequence[Text]) -> list[Text]:
    """Return the set whose worst text is looked for: some of all kinds."""
    chosen = [*copies, *others[:: max(1, len(others) // (MIXED_PROMPTS - len(copies)))]][:MIXED_PROMPTS]
    return [Text(MIXED, text.prompt) for text in chosen]


def run_all(llms: Mapping[str, LLM], texts: Sequence[Text], rounds: int, max_tokens: int) -> None:
    """Take every text with every way, round by round."""
    for llm in llms.values():
        llm.generate(texts[0].prompt, max_tokens=max_tokens)
    with click.progressbar(length=rounds * len(texts), label="texts", file=sys.stderr) as bar:
        for number in range(rounds):
            for text in texts:
                ways = list(llms)
                turned = ways[number % len(ways) :] + ways[: number % len(ways)]  # who comes first has cold caches
                made = {way: _generate(llms[way], text, max_tokens) for way in turned}
                _keep(text, made)
                bar.update(1)


def _generate(llm: LLM, text: Text, max_tokens: int) -> Generation:
    time.sleep(SETTLE_S)
    llm.session.trim(len(llm.session))
    return llm.generate(text.prompt, max_tokens=max_tokens)


def _keep(text: Text, made: Mapping[str, Generation]) -> None:
    expected = made[PLAIN].token_ids
    text.tokens = len(expected)
    for way, generation in made.items():
        if generation.token_ids != expected:
            raise VerificationError(f"{way} says other tokens than plain decoding after {text.prompt[:60]!r}")
        after_prompt_s = generation.ttft_s - generation.prefill_s + generation.decode_s
        text.seconds.setdefault(way, []).append(after_prompt_s)
        if generation.drafts is not None:
            text.figures[way] = generation.drafts.figures()


def summary(texts: Sequence[Text], ways: Sequence[str]) -> dict[str, Any]:
    """Return ratios by kind of text and way: of all seconds, of the worst and the median text, and of drafts."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(text.kind for text in texts):
        of_kind = [text for text in texts if text.kind == kind]
        chosen = [text for text in of_kind if text.tokens > SHORT]
        short = len(of_kind) - len(chosen)
        found[kind] = {way: {**_figures(chosen, way), "left_out": short} for way in ways if way != PLAIN}
    return found


def _figures(texts: Sequence[Text], way: str) -> dict[str, Any]:
    totals = [
        sum(text.seconds[PLAIN][number] for text in texts) / sum(text.seconds[way][number] for text in texts)
        for number in range(len(texts[0].seconds[way]))
    ]
    ratios = sorted(text.ratio(way) for text in texts)
    found = {
        "texts": len(texts),
        "ratio": round(statistics.median(totals), 3),
        "rounds": [round(total, 3) for total in totals],
        "worst": round(ratios[0], 3),
        "median": round(statistics.median(ratios), 3),
    }
    return found if way == AGAIN else found | _drafts([text.figures[way] for text in texts])


def _drafts(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    forwards, drafted, accepted = (sum(each[name] for each in figures) for name in ("forwards", "drafted", "accepted"))
    return {
        "tokens_per_forward": round((forwards + accepted) / forwards, 3),
        "drafted": drafted,
        "accepted": accepted,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a table."""
    lines = [
        f"{report['bundle']}, {report['threads']} threads, {report['max_tokens']} tokens; medians of "
        f"{report['rounds']} rounds; load average {report['load_average']:.2f} before, "
        f"{report['load_average_after']:.2f} after",
        "",
        "| text | drafts | speed over plain (rounds) | worst text | median text | tokens a forward | right drafts |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for kind, ways in report["kinds"].items():
        for way, found in ways.items():
            spread = f"{found['ratio']:.2f} ({min(found['rounds']):.2f} to {max(found['rounds']):.2f})"
            lines.append(
                f"| {kind}, {found['texts']} | {way} | {spread} | {found['worst']:.2f} | {found['median']:.2f} | "
                f"{found.get('tokens_per_forward', 1):.2f} | {found.get('accepted', 0)} of {found.get('drafted', 0)} |"
            )
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--each", type=click.IntRange(min=1), default=5, show_default=True, help="Prompts of each domain.")
@click.option("--fixed", multiple=True, type=int, help="Numbers of drafts to measure beside auto.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def main(
    bundle: Path,
    threads: int | None,
    rounds: int,
    max_tokens: int,
    each: int,
    fixed: tuple[int, ...],
    json_path: Path | None,
) -> None:
    """Measure BUNDLE and print a table in Markdown."""
    before = os.getloadavg()[0]
    llms = {way: LLM(bundle, threads=threads, drafts=NO_DRAFTS) for way in (PLAIN, AGAIN)}
    drafters = ["lookup", *(["mtp"] if DRAFT_HEAD in llms[PLAIN].bundle.manifest.graphs else [])]
    for drafter in drafters:
        for number in (None, *fixed):
            name = f"{drafter}, {'auto' if number is None else number}"
            llms[name] = LLM(bundle, threads=threads, drafts=DraftOptions(drafter=drafter, drafts=number))
    copies, others = list(copy_texts()), domain_texts(each)
    texts = [*copies, *others, *mixed_texts(copies, domain_texts(MIXED_PROMPTS))]
    run_all(llms, texts, rounds, max_tokens)
    report = {
        "bundle": str(bundle),
        "threads": llms[PLAIN].executor.threads,
        "rounds": rounds,
        "max_tokens": max_tokens,
        "load_average": before,
        "load_average_after": os.getloadavg()[0],
        "kinds": summary(texts, list(llms)),
        "texts": [
            {"kind": text.kind, "prompt": text.prompt[:80], "tokens": text.tokens}
            | {"ratios": {way: round(text.ratio(way), 3) for way in llms if way != PLAIN}, "drafts": text.figures}
            for text in texts
        ],
    }
    print(markdown(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
