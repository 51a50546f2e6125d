"""Figures of a benchmark from the samples of its rounds, as JSON values."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from engram_runtime.bench.bandwidth import Bandwidth
from engram_runtime.bench.draft_figures import draft_counts, draft_rounds
from engram_runtime.bench.rounds import DRAFTS, VERIFIED_TOKENS, Result, Settings
from engram_runtime.bundle import Bundle
from engram_runtime.cpu import available_cores, cpu_name

Tree = dict[str, Any]  # figures by name, some of them trees again
EXPERT_BYTES = "expert_bytes"
BY_ROUND = "by_round"


def per_round(result: Result, settings: Settings) -> Tree:
    """Return every figure that was measured in rounds, a list of its values in their order."""
    samples = result.samples
    timed = {name: answers for name, answers in samples.items() if name not in ("start", DRAFTS)}
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in timed.items()}
    forward = {str(tokens): [times[str(tokens)] for times in seconds["verify"]] for tokens in VERIFIED_TOKENS}
    depths = {
        str(depth): {
            "prefill_tok_s": [settings.prompt_tokens / s for s in seconds[f"prefill@{depth}"]],
            "decode_tok_s": [1 / s for s in seconds[f"decode@{depth}"]],
        }
        for depth in settings.depths
    }
    first = str(settings.depths[0])
    return {
        **depths[first],
        "verify_cost": {tokens: _ratios(times, forward["1"]) for tokens, times in forward.items() if tokens != "1"},
        "ttft_ms": [1e3 * s for s in seconds[f"prefill@{first}"]],
        "load_ms": [1e3 * start["load_s"] for start in samples["start"]],
        "start_ms": [
            1e3 * sum(start[key] for key in ("import_s", "load_s", "first_token_s")) for start in samples["start"]
        ],
        "verify_ms": {tokens: [1e3 * s for s in times] for tokens, times in forward.items()},
        "depths": depths,
        **({DRAFTS: draft_rounds(samples[DRAFTS])} if DRAFTS in samples else {}),
    }


def figures(result: Result, settings: Settings, bandwidth: Bandwidth) -> Tree:
    """Return a contestant's figures as JSON values: medians of the rounds and each round's, memory, and what ran."""
    rounds = per_round(result, settings)
    found = medians(rounds)
    experts = expert_bytes_of_a_token(result, settings)
    read = bytes_of_a_token(result, settings)
    drafts = {**found[DRAFTS], **draft_counts(result.samples[DRAFTS])} if DRAFTS in found else None
    share = None if read is None else _rounded(read * found["decode_tok_s"] / (bandwidth.gb_s * 1e9))
    return {
        "runner": result.facts["name"],
        "build": result.facts["build"] + (f", {types}" if (types := result.contestant.types) else ""),
        "threads": result.facts["threads"],
        **found,
        **result.memory,
        "bandwidth_share": share,
        "bytes_per_token": read,
        "expert_bytes_per_token": experts,
        "verify_experts": verify_experts(result),
        **({DRAFTS: drafts} if settings.prompts else {}),
        BY_ROUND: _each(rounds, lambda values: [_rounded(value) for value in values]),
    }


def ratios(result: Result, peer: Result, settings: Settings) -> Tree:
    """Return how many times the peer's value each figure is, in each round."""
    return _both(per_round(result, settings), per_round(peer, settings), _ratios)


def medians(tree: Tree) -> Tree:
    """Return the medians of a tree of lists."""
    return _each(tree, lambda values: _rounded(statistics.median(values)))


def expert_bytes_of_a_token(result: Result, settings: Settings) -> int | None:
    """Return the mean bytes of experts a decoded token reads; None without experts or where they aren't counted."""
    answers = result.samples[f"decode@{settings.depths[0]}"]
    return round(statistics.mean(answer[EXPERT_BYTES] for answer in answers)) or None


def verify_experts(result: Result) -> dict[str, float] | None:
    """Return the mean number of distinct experts that a pass over so many tokens reads, None as above."""
    answers = [answer["experts"] for answer in result.samples["verify"]]
    if answers[0]["1"] is None:
        return None
    return {size: _rounded(statistics.mean(answer[size] for answer in answers)) for size in answers[0]}


def bytes_of_a_token(result: Result, settings: Settings) -> int | None:
    """Return the bytes of weights a decoded token reads, experts included; None where that isn't known."""
    weights = result.contestant.weight_bytes
    if weights is None:
        weights = result.facts["weight_bytes"]
    return None if weights is None else weights + (expert_bytes_of_a_token(result, settings) or 0)


def report(results: Sequence[Result], settings: Settings, bandwidth: Bandwidth, load_average: Sequence[float]) -> Tree:
    """Return the whole report as JSON values.

    Args:
        results: the bundle's and, where there is one, the peer's.
        load_average: of the last minute, before and after.
    """
    first, *peers = results
    found: Tree = {
        **figures(first, settings, bandwidth),
        "bandwidth_gb_s": _rounded(bandwidth.gb_s),
        "bandwidth_mb": _rounded(bandwidth.read_bytes / 1e6),
        "prompt_tokens": settings.prompt_tokens,
        "decode_tokens": settings.decode_tokens,
        "rounds": settings.rounds,
        "draft_options": asdict(settings.drafts),
        **({"prompts": dict(settings.prompts)} if settings.prompts else {}),
        "tables": first.facts["tables"],
        "load_average": load_average[0],
        "load_average_after": load_average[1],
    }
    if first.profile is not None:
        found["profile"] = first.profile
    for peer in peers:
        found["against"] = figures(peer, settings, bandwidth)
        once = {
            key: _ratio(found[key], found["against"][key]) for key in ("rss_anon_mb", "rss_file_mb", "bandwidth_share")
        }
        found["against"]["ratios"] = {**medians(ratios(first, peer, settings)), **once}
    return found


def where(bundle: Bundle) -> Tree:
    """Return what was measured and on which machine, as JSON values."""
    manifest = bundle.manifest
    weights = manifest.entry(manifest.decoder.weights).sha256
    return {
        "bundle": {"path": str(bundle.path), "quantisation": manifest.model.quantisation, "weights_sha256": weights},
        "machine": {"cpu": cpu_name(), "cores": available_cores()},
    }


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else _rounded(value / by)


def _ratios(values: Sequence[float], by: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, by, strict=True)]


def _each(tree: Tree, change: Callable[[Any], Any]) -> Tree:
    return {key: _each(value, change) if isinstance(value, dict) else change(value) for key, value in tree.items()}


def _both(tree: Tree, other: Tree, join: Callable[[Any, Any], Any]) -> Tree:
    """Join what stands in both."""
    return {
        key: _both(value, other[key], join) if isinstance(value, dict) else join(value, other[key])
        for key, value in tree.items()
        if key in other
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
