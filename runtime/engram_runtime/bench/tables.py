"""Measuring a bundle's tables: warm, cold and within a cap of memory, in rounds beside raw reads of the same file.

Warm, a round's rows are looked up once before they are timed. Cold, the table is closed, its pages are dropped and it
is opened anew. Capped, a process of its own may hold a share of the table only, and its rows are random.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from engram_runtime.bench.cgroup import memory_group
from engram_runtime.bench.process import Worker
from engram_runtime.bench.tables_runner import CAPPED, COLD, WARM, Sample
from engram_runtime.errors import TargetError
from engram_runtime.sizes import format_size
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.options import RESIDENT, TableOptions

STATES = (WARM, COLD, CAPPED)
WORKER = (sys.executable, "-P", "-m", "engram_runtime.bench.tables_worker")
MOST_STAYED = 0.02  # of a table's pages: with more of them in memory its rows are not cold
CAP_SHARE, LEAST_CAP = 10, 256 << 20  # of a table; what a process needs besides it

StartWorker = Callable[[str, Sequence[str]], Worker]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSettings:
    """What is measured: a chunk of ``tokens``, ``rounds`` of each state, raw reads of a chunk at ``depth``.

    ``cap_bytes`` is the memory of the capped process, or None for a tenth of each table.
    """

    tokens: int
    rounds: int
    depth: int
    cap_bytes: int | None

    def cap(self, table_bytes: int) -> int:
        """Return the memory that the capped process may hold."""
        return max(table_bytes // CAP_SHARE, LEAST_CAP) if self.cap_bytes is None else self.cap_bytes


@dataclass(slots=True)
class TableResult:
    """A site's samples by state; ``skipped`` says why a state has none."""

    spec: TableSpec
    facts: dict[str, Any]
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableBench:
    """Measures one bundle; ``progress`` is told of rounds that are over."""

    model: str
    executor: str
    options: TableOptions
    settings: TableSettings
    progress: Callable[[int], object]
    start_worker: StartWorker = Worker

    def measure(self, spec: TableSpec) -> TableResult:
        """Measure a site in all states, those that can't be are said to be skipped.

        Raises:
            EngramError: as the site's worker answers.
        """
        with self.start_worker(spec.site, WORKER) as worker:
            result = TableResult(spec, self._load(worker, spec))
            result.samples[WARM] = self._rounds(worker, WARM)
            if reason := self._not_cold(worker, result):
                self._skip(result, reason, COLD, CAPPED)
                return result
            result.samples[COLD] = self._rounds(worker, COLD)
        try:
            result.samples[CAPPED] = self._capped(result)
        except TargetError as error:
            self._skip(result, str(error), CAPPED)
        return result

    def _skip(self, result: TableResult, reason: str, *states: str) -> None:
        for state in states:
            result.skipped[state] = reason
            self.progress(1 + self.settings.rounds)

    def _not_cold(self, worker: Worker, result: TableResult) -> str | None:
        """Say why rows can't be made cold, or return None where they can."""
        if result.facts["io"] == RESIDENT:
            return "the table is held in memory, where no row is cold; measure its files with --table-io mmap"
        if (stayed := worker.ask("evict")["stayed"]) > MOST_STAYED:
            return (
                f"{stayed:.0%} of the table's pages stay in memory: its file system is memory, another process maps "
                f"them, or this user may not ask"
            )
        return None

    def _capped(self, result: TableResult) -> list[Sample]:
        """Measure in a process with a cap; raises TargetError where there can be none or it ends the process.

        Nor is there one by default for a table that the least cap would hold whole.
        """
        size = result.spec.num_rows * result.spec.record.record_bytes
        cap = self.settings.cap(size)
        if self.settings.cap_bytes is None and size <= cap:
            raise TargetError(
                f"a process needs {format_size(cap)}, which hold the whole table of {format_size(size)}; "
                f"give --memory to measure all the same"
            )
        with ExitStack() as opened:
            group = opened.enter_context(memory_group(str(os.getpid()), cap))
            worker = opened.enter_context(self.start_worker(result.spec.site, group.command(WORKER)))
            self._load(worker, result.spec)
            worker.ask("evict")
            worker.ask("fill", num_bytes=cap)
            return self._rounds(worker, CAPPED)

    def _load(self, worker: Worker, spec: TableSpec) -> dict[str, Any]:
        options = {"io": self.options.io, "ram_bytes": self.options.ram_bytes}
        return worker.ask("load", model=self.model, site=spec.site, executor=self.executor, options=options)

    def _rounds(self, worker: Worker, state: str) -> list[Sample]:
        samples = []
        for number in range(1 + self.settings.rounds):  # the first one isn't counted
            seed = number * len(STATES) + STATES.index(state)
            settings = {"tokens": self.settings.tokens, "depth": self.settings.depth}
            samples.append(worker.ask("round", state=state, seed=seed, **settings))
            self.progress(1)
        return samples[1:]
