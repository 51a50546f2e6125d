"""What a text took of tables, drafts and experts."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.executor import added
from engram_runtime.keyers import NO_ROW
from engram_runtime.session import Session
from engram_runtime.site import Site
from engram_runtime.tables.counters import TableCounters

RowIds = Mapping[str, NDArray[np.int64]]  # by site, [R, C]


@dataclass(frozen=True, slots=True)
class PassCosts:
    """What a pass took.

    Attributes:
        experts: that it read, or None where that isn't counted.
        waits: how many rows were cold and how long it waited for them, of sites where any was.
    """

    seconds: float
    experts: int | None
    waits: Mapping[str, TableCounters]


class PassMeter:
    """Measures passes of the sessions of one executor, of which this is one."""

    def __init__(self, session: Session) -> None:
        self._executor = session.executor
        self._sites = session.sites
        self.begin()

    def begin(self) -> None:
        """Begin a pass."""
        self._experts = self._executor.experts_read
        self._waits = self._waited()
        self._began = time.perf_counter()

    def end(self) -> PassCosts:
        """Return what the pass took."""
        seconds = time.perf_counter() - self._began
        waits = {}
        for site, (cold, wait_s), (cold_before, wait_before_s) in zip(
            self._sites, self._waited(), self._waits, strict=True
        ):
            if cold > cold_before:
                waits[site.name] = TableCounters(cold=cold - cold_before, wait_s=wait_s - wait_before_s)
        return PassCosts(seconds, added(self._experts, self._executor.experts_read), waits)

    def _waited(self) -> list[tuple[int, float]]:
        return [(site.table.counters.cold, site.table.counters.wait_s) for site in self._sites]


def since(before: Mapping[str, TableCounters], session: Session) -> Mapping[str, TableCounters]:
    """Return what tables were asked for since `Session.counters` were those."""
    return {site: now - before[site] for site, now in session.counters.items()}


class Usage:
    """Sums over the passes that a text is part of.

    Rows and bytes are those of its own tokens; cold ones, waiting and experts are those of whole passes.

    Attributes:
        prefilled_tokens, prefill_s: of the prompt that were computed, and the seconds of their passes.
        passes: that decoded a token of it without drafts.
        drafts: what they came to, None where none were made.
        experts: see `engram_runtime.generation.Generation.experts`.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.prefilled_tokens = 0
        self.prefill_s = 0.0
        self.passes = 0
        self.drafts: DraftStatistics | None = None
        self.experts: int | None = None
        self._record_bytes = {site.name: site.spec.record.record_bytes for site in sites}
        self._tables = {site.name: TableCounters() for site in sites}
        self._rows: list[tuple[RowIds, int]] = []  # of a pass each, counted in the end: that takes less of their time

    @property
    def tables(self) -> Mapping[str, TableCounters]:
        """See `engram_runtime.generation.Generation.tables`."""
        for site, counters in self._tables.items():
            ids = [row_ids[site][row] for row_ids, row in self._rows if site in row_ids]
            if ids:
                self._tables[site] = counters + _counted(np.stack(ids), self._record_bytes[site])
        self._rows = []
        return self._tables

    def add_prompt(self, count: int, seconds: float, tables: Mapping[str, TableCounters]) -> None:
        """Count a pass that computed so many tokens of the prompt."""
        self.prefilled_tokens += count
        self.prefill_s += seconds
        self.add_tables(tables)

    def add_tables(self, counters: Mapping[str, TableCounters]) -> None:
        """Count what tables were asked for by this text alone."""
        for site, counts in counters.items():
            self._tables[site] += counts

    def add_pass(self, costs: PassCosts, row_ids: RowIds, row: int) -> None:
        """Count a pass that decoded a token, whose rows are those in place ``row``."""
        self.passes += 1
        self._rows.append((row_ids, row))
        self.add_experts(costs.experts)
        self.add_tables(costs.waits)

    def add_experts(self, read: int | None) -> None:
        """Count what a pass after the prompt's read, None where that isn't counted."""
        if read is not None:
            self.experts = read + (self.experts or 0)

    def add_drafts(self, drafts: DraftStatistics) -> None:
        """Count those of a stretch that was drafted."""
        self.drafts = self.drafts + drafts if self.drafts else drafts


def _counted(row_ids: NDArray[np.int64], record_bytes: int) -> TableCounters:
    """Return the counts of ``[T, C]`` row ids that were asked for token by token."""
    ordered = np.sort(row_ids, axis=1)
    first = np.diff(ordered, axis=1, prepend=NO_ROW) != 0  # NO_ROW sorts before all ids
    unique = int(first.sum())
    return TableCounters(rows=int((row_ids != NO_ROW).sum()), unique=unique, bytes=unique * record_bytes)
