"""A plan as JSON values."""

import math
from dataclasses import asdict
from typing import Any

from engram_runtime.planning.outline import DRAFT, EMBEDDING, EXPERTS, ROTATIONS, Outline
from engram_runtime.planning.plan import Plan, TableWait

WEIGHT_ROLES = ("dense", "head", EXPERTS, EMBEDDING, ROTATIONS, DRAFT)


def plan_figures(plan: Plan) -> dict[str, Any]:
    """Return all of a plan; bytes, seconds, tokens a second."""
    outline, machine = plan.outline, plan.machine
    return {
        "path": str(outline.path),
        "model": outline.model,
        "family": outline.family,
        "quantisation": outline.quantisation,
        "parameters": outline.parameters,
        "source_bytes": outline.source_bytes,
        "read_from": outline.read_from,
        "context": outline.context_length,
        "positions": plan.positions,
        "weights": weights(outline),
        "foreign": outline.foreign,
        "stored_bytes": outline.stored(),
        "packed_bytes": outline.packed(),
        "cache_bytes_per_token": outline.cache_bytes(1),
        "cache_bytes": outline.cache_bytes(plan.positions),
        "state_bytes": outline.state_bytes,
        "bytes_per_token": outline.whole_bytes + outline.expert_bytes,
        "expert_bytes_per_token": outline.expert_bytes,
        "export": None if outline.export is None else asdict(outline.export),
        "memory": {**plan.need.rows(), "least_bytes": plan.need.least, "total_bytes": plan.need.total},
        "tables": [_table(wait) for wait in plan.tables],
        "machine": {
            "memory_bytes": machine.memory.num_bytes,
            "bandwidth_gb_s": machine.bandwidth_gb_s,
            "bandwidth_measured": machine.measured_bandwidth,
            "threads": machine.threads,
            "target": machine.target,
            "disk": machine.disk.words,
            "disk_figures": None if machine.disk.facts is None else asdict(machine.disk.facts),
            "free_disk_bytes": machine.free_disk_bytes,
        },
        "rates": None if plan.rates is None else _rates(plan),
        "price_per_million": dict(plan.prices),
        "verdict": plan.verdict.kind,
        "reason": plan.verdict.reason,
        "commands": list(plan.commands),
    }


def weights(outline: Outline) -> list[dict[str, Any]]:
    """Return bytes stored and packed by what reads the weights."""
    return [
        {"weights": role, "stored_bytes": stored, "packed_bytes": outline.packed(role)}
        for role in WEIGHT_ROLES
        if (stored := outline.stored(role)) or outline.packed(role)
    ]


def _rates(plan: Plan) -> dict[str, Any]:
    assert plan.rates is not None
    return {
        "decode_tok_s": {str(depth): _rounded(rate) for depth, rate in plan.rates.decode.items()},
        "prefill_tok_s": _rounded(plan.rates.prefill),
        "experts_on_disk": plan.rates.experts_on_disk,
    }


def _table(wait: TableWait) -> dict[str, Any]:
    times = {key: value for key, value in asdict(wait).items() if key != "choice"}
    return {**wait.choice.figures(), **times}


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else float(f"{value:.4g}")
