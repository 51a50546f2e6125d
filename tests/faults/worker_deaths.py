"""C7 and C13: the process that generates is ended for want of memory, or by its own native code, again and again."""

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable
from random import Random

from tests.faults.row import Outcome, Row
from tests.faults.worker_clients import LONGEST_S, LOST, Others, ask, longest_s
from tests.faults.worker_toy import ABORT, COMMAND, EXIT, MEMORY, SEGMENTATION, toy_engine
from tests.served import served

from engram_runtime.bench.cgroup import memory_group
from engram_runtime.errors import TargetError
from engram_runtime.serving.worker.process import WorkerProcess

WORKER_BYTES = 256 << 20


def ended_for_memory(count: int) -> Outcome:
    """C7: a request has the worker take all the memory its control group has; without such a group it is killed."""
    with contextlib.ExitStack() as made:
        try:
            group = made.enter_context(memory_group(f"faults-{os.getpid()}", WORKER_BYTES))
        except TargetError as reason:
            return _killed(count, f"by kill -9, as {reason}")
        return _deaths(
            "C7",
            count,
            lambda: WorkerProcess(group.command(COMMAND)),
            lambda url, chance: _ask_for_death(url, MEMORY),
            "by the kernel",
        )


def _killed(count: int, how: str) -> Outcome:
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        started.append(WorkerProcess(COMMAND))
        return started[-1]

    def kill(url: str, chance: Random) -> str:
        os.kill(started[-1].pid, signal.SIGKILL)
        return ""

    return _deaths("C7", count, start, kill, how)


def crashed(count: int) -> Outcome:
    """C13: a forward pass aborts, reads where there is nothing, or leaves the process."""
    how = (ABORT, SEGMENTATION, EXIT)
    return _deaths(
        "C13",
        count,
        lambda: WorkerProcess(COMMAND),
        lambda url, chance: _ask_for_death(url, chance.choice(how)),
        "by abort, segmentation fault or exit in a pass",
    )


def _ask_for_death(url: str, token_id: int) -> str:
    answer = ask(url, [token_id, 1])
    return "" if answer.kind == LOST else f"the request that it died of was told {answer.kind}"


def _deaths(
    name: str, count: int, start: Callable[[], WorkerProcess], kill: Callable[[str, Random], str], how: str
) -> Outcome:
    chance, recovered_s, failures, allowed_s = Random(name), [], [], LONGEST_S
    with toy_engine(start) as engine, served(engine) as url, Others(url) as others:
        for trial in range(count):
            time.sleep(chance.random() * 0.1)
            fault = kill(url, chance)
            took_s = _until_recovered(url)
            recovered_s.append(took_s)
            allowed_s = max(allowed_s, longest_s())
            fault = fault or ("" if took_s <= longest_s() else f"a new worker took {took_s:.1f} s")
            if fault:
                failures.append(f"death {trial}: {fault}")
        restarts = engine.health.restarts
    if restarts != count:
        failures.append(f"{restarts} workers were started for {count} deaths")
    told = ", ".join(f"{number} x {status}" for status, number in sorted(others.counts.items()))
    median_s, longest = statistics.median(recovered_s), max(recovered_s)
    figure = (
        f"{how}; answers again after {median_s:.1f} s, at most {longest:.1f} s{_stretched(allowed_s)}; "
        f"others were told {told}, the slowest after {others.slowest_s:.1f} s"
    )
    failures += others.failures
    return Outcome(tried=count, survived=max(0, count - len(failures)), figure=figure, failures=tuple(failures[:5]))


def _stretched(allowed_s: float) -> str:
    """Say so where times are those of a machine that others use."""
    return "" if allowed_s == LONGEST_S else f" (up to {allowed_s:.0f} allowed, as others use this machine)"


def _until_recovered(url: str) -> float:
    """Return how long it takes until a text comes."""
    began = time.monotonic()
    while ask(url, [1, 2, 3]).status != 200:
        if time.monotonic() - began > 60:
            break
        time.sleep(0.05)
    return time.monotonic() - began


ROWS = (
    Row(
        name="C7",
        fault="worker ended for want of memory",
        expected="its requests 502, others 503 and no hang, answers again within 5 s",
        quick=20,
        full=100,
        run=ended_for_memory,
    ),
    Row(
        name="C13",
        fault="native crash in a pass",
        expected="its request 502, others 503 and no hang, answers again within 5 s",
        quick=20,
        full=100,
        run=crashed,
    ),
)
