"""What is measured, and the measurements themselves; they run in the runner's own process."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bench.continuations import drafted
from engram_runtime.executor import added

DECODE_PASSES, PREFILL_PASSES = 51, 5  # of a profile: short steps are the ones that noise spoils
WARM_UP, REPEATS = 1, 5  # passes of a verification before those that count, and those


class Runner(Protocol):
    """One sequence of a loaded model, as `engram_runtime.session.Session` has it.

    Attributes:
        name: what it is called in the report.
        build: one line that says what runs: versions and instruction sets.
        threads: worker threads.
        vocab_size: how many token ids there are.
        weight_bytes: of the weights each token reads, experts left out; None where that isn't known.
    """

    name: str
    threads: int
    vocab_size: int

    @property
    def build(self) -> str: ...

    @property
    def weight_bytes(self) -> int | None: ...

    @property
    def tables(self) -> Sequence[Mapping[str, Any]]:
        """How each table is read: the figures of a `engram_runtime.tables.policy.TableChoice`."""
        ...

    @property
    def expert_bytes_read(self) -> int | None:
        """Bytes of experts' weights read so far, or None where that isn't counted."""
        ...

    @property
    def experts_read(self) -> int | None:
        """How many experts these were, each layer's distinct ones pass by pass; None without any and as above."""
        ...

    def __len__(self) -> int: ...

    def prefill(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Add tokens and return the logits ``[V]`` after the last one."""
        ...

    def decode(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Add k tokens at once and return the logits ``[k, V]`` after each of them."""
        ...

    def trim(self, count: int) -> object:
        """Forget the last ``count`` tokens."""
        ...

    def profile(self, prepare: Callable[[], None], step: Callable[[], object], passes: int) -> Mapping[str, Any]:
        """Say what each kind of kernel takes of ``step``; see `engram_runtime.bench.kernel_times`."""
        ...


def prefill(runner: Runner, *, depth: int, tokens: int) -> dict[str, float]:
    """Time a prompt after ``depth`` tokens up to the choice of the next one."""
    _go_to(runner, depth)
    token_ids = text(runner, depth, tokens)
    started = time.perf_counter()
    runner.prefill(token_ids).argmax()
    return {"seconds": time.perf_counter() - started}


def decode(runner: Runner, *, depth: int, tokens: int) -> dict[str, float]:
    """Time tokens one by one after ``depth`` others; the median, and the mean bytes of experts read."""
    _go_to(runner, depth)
    first, *others = text(runner, depth, WARM_UP + tokens)
    runner.decode([first])
    before = runner.expert_bytes_read or 0
    seconds = []
    for token_id in others:
        started = time.perf_counter()
        runner.decode([token_id])
        seconds.append(time.perf_counter() - started)
    read = (runner.expert_bytes_read or 0) - before
    return {"seconds": statistics.median(seconds), "expert_bytes": read / tokens}


def verify(runner: Runner, *, depth: int, sizes: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """Time forward passes over so many tokens with all their logits, each after the same ``depth`` others; by size.

    Those of a size follow one another, so that only the first of them finds its code cold. They read as many experts
    each.
    """
    taken = {str(tokens): _forward(runner, depth, tokens) for tokens in sizes}
    return {
        "seconds": {size: seconds for size, (seconds, _) in taken.items()},
        "experts": {size: experts for size, (_, experts) in taken.items()},
    }


def _forward(runner: Runner, depth: int, tokens: int) -> tuple[float, int | None]:
    """Return the median seconds of passes over so many tokens, and the experts that the last one read."""
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        _go_to(runner, depth)
        token_ids, experts = text(runner, depth, tokens), runner.experts_read
        started = time.perf_counter()
        runner.decode(token_ids)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:]), added(experts, runner.experts_read)


def profile(runner: Runner, *, depth: int, tokens: int) -> dict[str, Any]:
    """Say where the time of a decode step after ``depth`` tokens goes, and of a prompt of ``tokens`` after as many."""
    one, prompt = text(runner, depth, 1), text(runner, depth, tokens)
    return {
        "decode": runner.profile(lambda: _go_to(runner, depth), lambda: runner.decode(one), DECODE_PASSES),
        "prefill": runner.profile(lambda: _go_to(runner, depth), lambda: runner.prefill(prompt), PREFILL_PASSES),
    }


def text(runner: Runner, start: int, count: int) -> list[int]:
    """Return the ids at places ``start`` to ``start + count`` of a fixed random text, the same for every runner."""
    ids: list[int] = np.random.default_rng(0).integers(0, runner.vocab_size, size=start + count).tolist()
    return ids[start:]


def _go_to(runner: Runner, depth: int) -> None:
    """Make the sequence hold the first ``depth`` tokens of the text."""
    held = len(runner)
    if held > depth:
        runner.trim(held - depth)
    elif held < depth:
        runner.prefill(text(runner, held, depth - held))


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "prefill": prefill,
    "decode": decode,
    "verify": verify,
    "profile": profile,
    "drafts": drafted,
}
