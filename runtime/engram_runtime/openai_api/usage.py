"""What an answer took, as OpenAI counts it, and what tables and drafts did for it."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.generation import Generation


def usage(generations: Sequence[Generation], choices: int) -> dict[str, Any]:
    """Return ``usage`` of the texts of a request, ``choices`` for each prompt, which counts once."""
    prompts = generations[::choices]
    prompt_tokens = sum(made.prompt_tokens for made in prompts)
    completion_tokens = sum(len(made.token_ids) for made in generations)
    cached_tokens = sum(max(made.prompt_tokens - made.prefilled_tokens, 0) for made in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def engram_usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Return ``usage.engram``: sums over the texts; times in milliseconds."""
    drafts = [made.drafts for made in generations if made.drafts is not None]
    experts = [made.experts for made in generations if made.experts is not None]
    return {
        "sites": {site: _site(generations, site) for site in generations[0].tables},
        "drafts": _drafts(reduce(add, drafts)) if drafts else None,
        "experts": sum(experts) if experts else None,
    }


def _site(generations: Sequence[Generation], site: str) -> dict[str, Any]:
    counters = reduce(add, (made.tables[site] for made in generations))
    return {
        "rows": counters.rows,
        "unique": counters.unique,
        "bytes": counters.bytes,
        "cold": counters.cold,
        "wait_ms": round(counters.wait_s * 1e3, 3),
    }


def _drafts(drafts: DraftStatistics) -> dict[str, Any]:
    return {
        "made": sum(drafts.drafted),
        "accepted": sum(drafts.accepted),
        "tokens_per_forward": round(drafts.tokens_per_forward, 3),
    }
