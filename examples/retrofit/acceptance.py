"""How many of a head's drafts the model would say itself, on text that it wrote freely and greedily.

Every-position acceptance counts, at every token, whether the first 1, 2, .. k drafts from there are all right. The loop
counts as decoding does: a verify step says the right drafts and one token more, and the next starts after it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from examples.retrofit.mtp_data import Example
from examples.retrofit.mtp_head import MAX_STEPS, Chain, DraftHead, Frozen

RESAMPLES = 2000
LOOP_TOKENS = 12

T = TypeVar("T")
Drafter = Callable[[Example], NDArray[np.int64]]
"""Returns how many drafts in a row are right, int64 [generated - 1]: at every token the model chose but the last."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What is counted of one text; arrays over k = 1 .. MAX_STEPS.

    positions, right: of every-position acceptance. said, steps: tokens said and verify steps of the loop.
    """

    positions: int
    right: NDArray[np.int64]
    said: NDArray[np.int64]
    steps: NDArray[np.int64]


@torch.inference_mode()
def head_drafts(head: DraftHead, frozen: Frozen, example: Example) -> NDArray[np.int64]:
    """Draft with a head from the model's own states."""
    roots = len(example.tokens) - 2
    state, chain = example.hidden[None, :roots].float(), Chain([], [])
    tokens = torch.cat((example.tokens, torch.full((MAX_STEPS,), -1)))
    right = torch.ones(roots, dtype=torch.bool)
    lengths = torch.zeros(roots, dtype=torch.long)
    for step in range(MAX_STEPS):
        embedding = frozen.model.model.embed_tokens(tokens[step + 1 : step + 1 + roots].clamp_min(0))[None]
        state = head(embedding, state, frozen.rotary(step, roots), chain)
        drafted = head.draft_vocab[(state[0] @ frozen.rows.T).argmax(-1)]
        right &= drafted == tokens[step + 2 : step + 2 + roots]
        lengths += right
    return lengths[example.start - 1 :].numpy()


def lookup_drafts(example: Example) -> NDArray[np.int64]:
    """Draft what followed the last 3, else 2 tokens where they stood last: prompt look-up, the baseline."""
    tokens = example.tokens.tolist()
    return np.array([_looked_up(tokens, at) for at in range(example.start + 1, len(tokens))], dtype=np.int64)


def _looked_up(tokens: list[int], at: int) -> int:
    for width in (3, 2):
        suffix = tokens[at - width : at]
        for start in range(at - width - 1, -1, -1):
            if tokens[start : start + width] == suffix:
                drafts = tokens[start + width : min(start + width + MAX_STEPS, at)]
                return agreement(drafts, tokens[at : at + MAX_STEPS])
    return 0


def agreement(drafts: Sequence[int], truth: Sequence[int]) -> int:
    """Return how many drafts, from the first on, are what the model says."""
    count = 0
    while count < min(len(drafts), len(truth)) and drafts[count] == truth[count]:
        count += 1
    return count


def in_loops(example: Example) -> NDArray[np.bool_]:
    """Tell which drafted tokens end a run of `LOOP_TOKENS` that stands earlier in the answer, bool [generated - 1]."""
    generated = example.tokens[example.start :].tolist()
    seen: set[tuple[int, ...]] = set()
    repeated = []
    for end in range(1, len(generated) + 1):
        run = tuple(generated[max(0, end - LOOP_TOKENS) : end])
        repeated.append(len(run) == LOOP_TOKENS and run in seen)
        seen.add(run)
    return np.array(repeated[1:], dtype=bool)


def count(lengths: NDArray[np.int64], chosen: NDArray[np.bool_] | None = None) -> Counts:
    """Count one text's right drafts; chosen: bool, the positions that every-position acceptance is of (all)."""
    picked = lengths if chosen is None else lengths[chosen]
    loops = [_loop(lengths, k) for k in range(1, MAX_STEPS + 1)]
    right = np.array([(picked >= k).sum() for k in range(1, MAX_STEPS + 1)])
    said, steps = np.array(loops).T
    return Counts(len(picked), right, said, steps)


def _loop(lengths: NDArray[np.int64], k: int) -> tuple[int, int]:
    at = steps = 0
    while at < len(lengths):
        at += min(int(lengths[at]), k) + 1
        steps += 1
    return min(at, len(lengths)), steps


def summary(counts: Sequence[Counts], seed: int = 0) -> dict[str, Any]:
    """Return the ratios with 95 % intervals: prompts are drawn again `RESAMPLES` times."""
    right, positions = np.array([c.right for c in counts]), np.array([c.positions for c in counts])
    said, steps = np.array([c.said for c in counts]), np.array([c.steps for c in counts])
    draws = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    return {
        "prompts": len(counts),
        "positions": int(positions.sum()),
        "every_position": _intervals(right, positions[:, None], draws),
        "tokens_per_step": _intervals(said, steps, draws),
    }


def _intervals(
    above: NDArray[np.int64], below: NDArray[np.int64], draws: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    value = above.sum(0) / below.sum(0)
    resampled = above[draws].sum(1) / below[draws].sum(1)
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    return {
        f"k{k + 1}": {
            "value": round(float(value[k]), 4),
            "low": round(float(low[k]), 4),
            "high": round(float(high[k]), 4),
        }
        for k in range(MAX_STEPS)
    }


def report(examples: Sequence[Example], drafter: Drafter) -> dict[str, Any]:
    """Return acceptance of one drafter: over all, by domain, and outside of what repeats itself."""
    lengths = [drafter(example) for example in examples]
    counts = [count(found) for found in lengths]
    domains = sorted({example.domain for example in examples})
    loops = [in_loops(example) for example in examples]
    fresh = [count(found, ~loop) for found, loop in zip(lengths, loops, strict=True)]
    return {
        "all": summary(counts),
        **{name: summary(_of(name, examples, counts)) for name in domains},
        "outside_repetition": summary(fresh)["every_position"],
        "share_repeating": {name: _share(_of(name, examples, loops)) for name in domains} | {"all": _share(loops)},
    }


def _of(domain: str, examples: Sequence[Example], values: Iterable[T]) -> list[T]:
    return [value for example, value in zip(examples, values, strict=True) if example.domain == domain]


def _share(loops: Sequence[NDArray[np.bool_]]) -> float:
    return round(float(np.concatenate(loops).mean()), 4)
