"""Measure executors on one bundle, interleaved so that a busy machine slows them alike."""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_runtime.bundle import Bundle
from engram_runtime.executor import Executor, load_executor
from engram_runtime.session import Session


@dataclass(slots=True)
class BenchResult:
    """Seconds of each round of one executor, and the bytes of experts it read while decoding in all of them."""

    executor: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    load_s: float
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    decode_expert_bytes: int = 0

    @property
    def prefill_tok_s(self) -> float:
        """Median prompt tokens per second."""
        return self.prompt_tokens / statistics.median(self.prefill_s)

    @property
    def decode_tok_s(self) -> float:
        """Median tokens per second, one at a time."""
        return self.decode_tokens / statistics.median(self.decode_s)

    @property
    def expert_bytes_per_token(self) -> int | None:
        """Mean bytes of experts read per decoded token; None without experts or where they aren't counted."""
        return round(self.decode_expert_bytes / (self.decode_tokens * len(self.decode_s))) or None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "threads": self.threads,
            "load_ms": round(self.load_s * 1e3, 1),
            "prefill_tok_s": round(self.prefill_tok_s, 1),
            "decode_tok_s": round(self.decode_tok_s, 1),
            "expert_bytes_per_token": self.expert_bytes_per_token,
            "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens,
            "rounds": len(self.decode_s),
        }


_Run = tuple[Executor, Session, BenchResult]


def measure(
    bundle: Bundle,
    executors: Sequence[str],
    *,
    threads: int | None,
    prompt_tokens: int,
    decode_tokens: int,
    rounds: int,
    tables_on: bool,
    progress: Callable[[], None],
) -> list[BenchResult]:
    """Run every executor once a round after one round that isn't counted."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, bundle.manifest.model.vocab_size, size=prompt_tokens + decode_tokens).tolist()
    with contextlib.ExitStack() as opened:
        runs: list[_Run] = []
        for name in executors:
            started = time.perf_counter()
            executor = load_executor(name, bundle, threads=threads)
            threads = executor.threads  # what the first one chose holds for all, or they could not be compared
            session = opened.enter_context(Session.open(bundle, executor, tables_on=tables_on))
            load_s = time.perf_counter() - started
            runs.append((executor, session, BenchResult(name, threads, prompt_tokens, decode_tokens, load_s)))
        for counted in [False, *[True] * rounds]:
            for run in runs:
                _round(*run, token_ids, counted=counted)
                if counted:
                    progress()
    return [result for _, _, result in runs]


def _round(
    executor: Executor, session: Session, result: BenchResult, token_ids: Sequence[int], *, counted: bool
) -> None:
    session.trim(len(session))
    started = time.perf_counter()
    session.prefill(token_ids[: result.prompt_tokens])
    prefilled, read = time.perf_counter(), executor.expert_bytes_read or 0
    for token_id in token_ids[result.prompt_tokens :]:
        session.decode([token_id])
    finished = time.perf_counter()
    if counted:
        result.prefill_s.append(prefilled - started)
        result.decode_s.append(finished - prefilled)
        result.decode_expert_bytes += (executor.expert_bytes_read or 0) - read
