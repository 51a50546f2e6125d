"""Two reports of ``engram bench --json`` beside one another."""

import hashlib
import json
import reprlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_runtime.bench.report import BY_ROUND, Tree
from engram_runtime.bench.rounds import MOST_ROUNDS
from engram_runtime.errors import BundleError
from engram_runtime.evaluation.intervals import Estimate, ratio_of_runs
from engram_runtime.strict_json import Fields, read_json_object

PEER = "against"
TWICE = ("prefill_tok_s", "decode_tok_s")  # those of the first depth, which stand under depths as well
DEPTHS = "depths."
NO_PEER = "none"
Fact = str | int | float
Rounds = Mapping[str, Sequence[float]]  # by figure, its keys joined by dots


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What a comparison needs of a report: what may explain a difference, and each round's figures."""

    facts: Mapping[str, Fact]
    rounds: Rounds
    peer_rounds: Rounds


def read_report(path: Path) -> BenchReport:
    """Read a report; raises BundleError for a file that isn't one."""
    values = read_json_object(path)
    try:
        return _parse(values)
    except BundleError as error:
        raise BundleError(
            f"{path} is no report of this engram bench: {error}; make one with: engram bench BUNDLE --json > FILE"
        ) from error


def _parse(values: Mapping[str, Any]) -> BenchReport:
    fields = Fields(values, "it")
    bundle, machine = fields.fields("bundle"), fields.fields("machine")
    tables = [f"{table.take('site', str)} {table.take('io', str)}" for table in fields.objects("tables")]
    facts: dict[str, Fact] = {
        "executor": fields.take("runner", str),
        "build": fields.take("build", str),
        "threads": fields.count("threads"),
        "weights": bundle.take("weights_sha256", str)[:12],
        "quantisation": bundle.take("quantisation", str),
        "tables": ", ".join(tables) or "none read",
        "CPU": machine.take("cpu", str),
        "cores": machine.count("cores"),
        "load average": round(fields.number("load_average"), 2),
        "load average after": round(fields.number("load_average_after"), 2),
        "memory bandwidth, GB/s": fields.number("bandwidth_gb_s"),
        **{f"{name} tokens": fields.count(f"{name}_tokens") for name in ("prompt", "decode")},
        "drafts": _drafts(fields.fields("draft_options")),
        "texts": _texts(fields.fields("prompts")) if fields.given("prompts") else "none",
    }
    rounds = dict(_leaves(fields.fields(BY_ROUND), BY_ROUND))
    depths = dict.fromkeys(key.split(".")[1] for key in rounds if key.startswith(DEPTHS))
    facts["tokens before"] = ", ".join(depths)  # the first is what ttft_ms is of
    if PEER not in values:
        return BenchReport(facts={**facts, "peer": NO_PEER}, rounds=rounds, peer_rounds={})
    peer = fields.fields(PEER)
    facts["peer"] = f"{peer.take('runner', str)}, {peer.take('build', str)}"
    return BenchReport(facts=facts, rounds=rounds, peer_rounds=dict(_leaves(peer.fields(BY_ROUND), BY_ROUND)))


def _drafts(options: Fields) -> str:
    drafter = options.take("drafter", str)
    numbers = {name: options.number(name) for name in ("drafts", "mask_id", "confidence") if options.given(name)}
    return ", ".join([drafter, *(f"{name} {number:g}" for name, number in numbers.items())])


def _texts(prompts: Fields) -> str:
    """Return the texts that were gone on from, each by its name and what tells it from others of that name."""
    digests = {name: hashlib.sha256(json.dumps(text).encode()) for name, text in prompts.remaining().items()}
    return ", ".join(f"{name} {digest.hexdigest()[:8]}" for name, digest in digests.items())


def _leaves(fields: Fields, where: str, *above: str) -> Iterator[tuple[str, Sequence[float]]]:
    for key, value in fields.remaining().items():
        if isinstance(value, dict):
            yield from _leaves(Fields(value, f"{where}.{key}"), f"{where}.{key}", *above, key)
            continue
        rounds = Fields({key: value}, where).numbers(key)
        if not rounds or min(rounds) <= 0:
            raise BundleError(f"{where}.{key} is {reprlib.repr(list(rounds))}, expected positive numbers")
        if len(rounds) > MOST_ROUNDS:
            raise BundleError(f"{where}.{key} has {len(rounds)} rounds, expected at most {MOST_ROUNDS}")
        yield ".".join([*above, key]), rounds


def differences(first: BenchReport, second: BenchReport) -> dict[str, tuple[Fact, Fact]]:
    """Return the facts in which reports differ, by name, the first report's before the second's."""
    return {name: (fact, second.facts[name]) for name, fact in first.facts.items() if fact != second.facts[name]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A figure's medians in both reports and how many times the first one's the second one's is."""

    first: float
    second: float
    ratio: Estimate


def changes(first: Rounds, second: Rounds) -> dict[str, Change]:
    """Return what became of each figure that both have."""
    return {
        key: Change(
            first=statistics.median(first[key]),
            second=statistics.median(second[key]),
            ratio=ratio_of_runs(first[key], second[key]),
        )
        for key in first
        if key in second and key not in TWICE
    }


def comparison(first: BenchReport, second: BenchReport) -> Tree:
    """Return all of it as JSON values."""
    return {
        "differences": {name: list(facts) for name, facts in differences(first, second).items()},
        "figures": {key: asdict(change) for key, change in changes(first.rounds, second.rounds).items()},
        PEER: {key: asdict(change) for key, change in changes(first.peer_rounds, second.peer_rounds).items()},
    }


def markdown(names: Sequence[str], first: BenchReport, second: BenchReport) -> str:
    """Return all of it as text, the reports called by their ``names``."""
    lines = [
        *(f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)),
        *(f"differs: {fact}: {a} | {b}" for fact, (a, b) in differences(first, second).items()),
        "95 % intervals are of the rounds; what changes from one start to the next isn't in them",
        "",
        "| figure | A | B | B over A |",
        "|---|---:|---:|---:|",
        *_rows("", changes(first.rounds, second.rounds)),
        *_rows(f"{PEER}.", changes(first.peer_rounds, second.peer_rounds)),
    ]
    return "\n".join(lines)


def _rows(prefix: str, found: Mapping[str, Change]) -> Iterator[str]:
    for key, change in found.items():
        yield f"| {prefix}{key} | {change.first:.4g} | {change.second:.4g} | {change.ratio:.3f} |"
