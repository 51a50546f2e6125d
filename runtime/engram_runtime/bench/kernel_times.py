"""Where the time of a forward pass goes, by kind of kernel."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Protocol, runtime_checkable

from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor

SHAPE = re.compile(r"_\d.*")  # what follows the kind in the name of a kernel of ours, as in linear_int8_1_960_576
SERIAL = re.compile(r"\d+(?=_|$)")  # by which TVM tells kernels apart that it made, as in fused_multiply6_tir_sqrt1
BUILTIN = "vm.builtin."  # the virtual machine's own functions: shapes checked, memory taken

Kinds = Mapping[str, Mapping[str, Any]]  # calls and ms by kind of kernel
Call = tuple[str, float]  # a function's name and its seconds
Watcher = Callable[..., None]  # (function, name, whether it is about to run, result, *arguments)


@runtime_checkable
class Watchable(Protocol):
    """An executor that tells of every kernel it runs."""

    def watch(self, watcher: Watcher | None) -> None:
        """Call ``watcher`` before and after every kernel from now on, or no more with None."""
        ...


def kernel_times(
    executor: Executor, prepare: Callable[[], None], step: Callable[[], object], passes: int
) -> dict[str, Any]:
    """Run ``step`` twice a pass, unwatched and watched, ``prepare`` before each, and return what its kernels took.

    Returns:
        Medians over the passes: ``step_ms``, without watching; ``outside_ms``, what of it no kernel took, within each
        pass: the virtual machine, the caller, the rows of tables, 0 where noise is more than that; ``kernels``: by
        kind, ``calls`` and ``ms``, the longest first.

    Raises:
        RequestError: an executor that can't tell.
    """
    if not isinstance(executor, Watchable):
        raise RequestError(f"the {executor.name} executor can't tell kernels apart; give --profile with --executor tvm")
    taken = [(_plain_ms(prepare, step), by_kind(_watched_calls(executor, prepare, step))) for _ in range(passes)]
    return {
        "step_ms": round(median(plain_ms for plain_ms, _ in taken), 3),
        "outside_ms": outside_ms(taken),
        "kernels": medians([kernels for _, kernels in taken]),
    }


def outside_ms(taken: Sequence[tuple[float, Kinds]]) -> float:
    """Return the median over passes of the step's time less its kernels', or 0 where noise makes that negative."""
    outside: float = median(plain_ms - sum(kind["ms"] for kind in kernels.values()) for plain_ms, kernels in taken)
    return max(round(outside, 3), 0.0)


def medians(passes: Sequence[Kinds]) -> dict[str, dict[str, Any]]:
    """Return every kind's calls, which are the same in each pass, and its median time, the longest first."""
    times = {kind: median(kernels[kind]["ms"] for kernels in passes) for kind in passes[0]}
    longest_first = sorted(times.items(), key=lambda item: -item[1])
    return {kind: {"calls": passes[0][kind]["calls"], "ms": round(ms, 3)} for kind, ms in longest_first}


def by_kind(calls: Sequence[Call]) -> Kinds:
    """Sum the calls of a pass by kind of kernel, without what watching takes."""
    watching_s = min(seconds for _, seconds in calls)  # the shortest builtin does next to nothing
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, seconds in calls:
        if not name.startswith(BUILTIN):
            kinds[kind_of(name)].append(seconds - watching_s)
    return {kind: {"calls": len(times), "ms": sum(times) * 1e3} for kind, times in kinds.items()}


def kind_of(kernel: str) -> str:
    """Return a kernel's name without its shapes and numbers."""
    kind = SHAPE.sub("", kernel)
    return kind if kind != kernel else SERIAL.sub("", kernel)


def _plain_ms(prepare: Callable[[], None], step: Callable[[], object]) -> float:
    prepare()
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def _watched_calls(executor: Watchable, prepare: Callable[[], None], step: Callable[[], object]) -> list[Call]:
    calls: list[Call] = []
    started = 0.0

    def watcher(function: object, name: str, about_to_run: bool, *others: object) -> None:
        nonlocal started
        now = time.perf_counter()
        if not about_to_run:
            calls.append((name, now - started))
        started = time.perf_counter()

    prepare()
    executor.watch(watcher)
    try:
        step()
    finally:
        executor.watch(None)
    return calls
