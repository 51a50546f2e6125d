"""Stands around the parts of a sequence and tells a timeline when they ran; what isn't recorded runs without it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.drafter import Drafter, DrawDrafts, Groups, Proposal
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.executor import Executor, PendingRows, Step, StepInputs, added
from engram_runtime.keyers import Keyer
from engram_runtime.sampling import Sampler
from engram_runtime.site import Site
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.store import TableStore
from engram_runtime.tracing.timeline import DRAFT, GRAPH, HASH, READ, SAMPLE, VERIFY, WAIT, Timeline

TOKENS, ACCEPTED = "tokens a forward pass", "accepted drafts"
READY, EXPERTS = "rows of drafts ready in time", "experts a forward pass"


class Recorder:
    """Records one sequence: forward passes, what they wait for, look-ups, choices of tokens, drafts.

    Attributes:
        timeline: where.
    """

    def __init__(self, timeline: Timeline | None = None) -> None:
        self.timeline = timeline or Timeline()
        self._passes: list[tuple[float, float]] = []  # when those since the last generated tokens began and ended
        self._early: Mapping[str, TableCounters] = {}
        self._ready = 0

    def step(self, step: Step, executor: Executor) -> Step:
        """Return a step that does the same; ``executor`` counts its experts."""
        return _RecordedStep(step, executor, self.timeline, self._passes)

    def sites(self, sites: Sequence[Site], early: Mapping[str, TableCounters]) -> None:
        """Have sites look up as before, recorded; ``early`` goes on counting rows that are fetched for drafts."""
        for site in sites:
            site.keyer = _RecordedKeyer(site.keyer, site.name, self.timeline)
            site.table = _RecordedTable(site.table, site.name, self.timeline)
        self._early, self._ready = early, _ready(early)

    def sampler(self, sample: Sampler) -> Sampler:
        """Return a sampler that draws the same."""

        def recorded(logits: NDArray[np.float32], token_ids: Sequence[int]) -> int:
            began = self.timeline.now()
            token_id = sample(logits, token_ids)
            self.timeline.span(SAMPLE, "choose", began)
            return token_id

        return recorded

    def drafter(self, drafter: Drafter) -> Drafter:
        """Return a drafter that drafts the same."""
        return _RecordedDrafter(drafter, self.timeline)

    def statistics(self, *, drafter: str) -> DraftStatistics:
        """Return the counts of a generation, which are told to the timeline."""
        self._passes.clear()
        return _RecordedStatistics(drafter=drafter, told=self._verified)

    def _verified(self, drafted: int, said: int) -> None:
        """Take note of what the forward passes since the last call verified and said."""
        if drafted and self._passes:
            (began, _), (_, ended) = self._passes[0], self._passes[-1]
            self.timeline.add(VERIFY, f"{drafted} drafts", began, ended, drafted=drafted, accepted=said - 1)
        self._passes.clear()
        self.timeline.count(TOKENS, said)
        self.timeline.count(ACCEPTED, said - 1)
        if self._early:
            before, self._ready = self._ready, _ready(self._early)
            self.timeline.count(READY, self._ready - before)


def _ready(early: Mapping[str, TableCounters]) -> int:
    return sum(counters.early_ready for counters in early.values())


class _RecordedStep:
    """See `engram_runtime.executor.Step`."""

    def __init__(self, step: Step, executor: Executor, timeline: Timeline, passes: list[tuple[float, float]]) -> None:
        self._step, self._executor, self._timeline, self._passes = step, executor, timeline, passes

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        return self._step.told

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        rows = {site: PendingRows(each.shape, partial(self._fill, site, each)) for site, each in inputs.rows.items()}
        tokens, experts = len(inputs.token_ids), self._executor.experts_read
        began = self._timeline.now()
        logits = self._step(replace(inputs, rows=rows))
        ended = self._timeline.span(GRAPH, f"{tokens} tokens", began, tokens=tokens, position=inputs.position)
        self._passes.append((began, ended))
        if (read := added(experts, self._executor.experts_read)) is not None:
            self._timeline.count(EXPERTS, read)
        return logits

    def _fill(self, site: str, rows: PendingRows, out: NDArray[np.float32]) -> None:
        began = self._timeline.now()
        rows.fill(out)
        self._timeline.span(WAIT, site, began)


class _RecordedKeyer:
    """See `engram_runtime.keyers.Keyer`."""

    def __init__(self, keyer: Keyer, site: str, timeline: Timeline) -> None:
        self._keyer, self._site, self._timeline = keyer, site, timeline
        self.columns, self.context = keyer.columns, keyer.context

    def row_ids(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        began = self._timeline.now()
        row_ids = self._keyer.row_ids(history, token_ids)
        self._timeline.span(HASH, self._site, began, tokens=len(token_ids))
        return row_ids


class _RecordedTable:
    """See `engram_runtime.tables.store.TableStore`."""

    def __init__(self, table: TableStore, site: str, timeline: Timeline) -> None:
        self._table, self._site, self._timeline = table, site, timeline
        self.close = table.close

    @property
    def counters(self) -> TableCounters:
        return self._table.counters

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        began = self._timeline.now()
        self._table.gather(row_ids, out)
        self._timeline.span(READ, self._site, began, rows=len(row_ids))

    def request(self, row_ids: NDArray[np.int64]) -> None:
        began = self._timeline.now()
        self._table.request(row_ids)
        self._timeline.span(READ, f"request {self._site}", began, rows=len(row_ids))


class _RecordedDrafter:
    """See `engram_runtime.drafting.drafter.Drafter`."""

    def __init__(self, drafter: Drafter, timeline: Timeline) -> None:
        self._drafter, self._timeline = drafter, timeline
        self.name, self.forget = drafter.name, drafter.forget

    @property
    def token_ids(self) -> Sequence[int]:
        return self._drafter.token_ids

    def add(self, token_ids: Sequence[int], hidden: NDArray[np.float32]) -> None:
        began = self._timeline.now()
        self._drafter.add(token_ids, hidden)
        self._timeline.span(DRAFT, "add", began, tokens=len(token_ids))

    def propose(self, token_id: int) -> Proposal:
        began = self._timeline.now()
        proposal = self._drafter.propose(token_id)
        self._timeline.span(DRAFT, "propose", began)
        return replace(proposal, draw=partial(self._draw, proposal.draw))

    def _draw(self, draw: DrawDrafts, count: int) -> Groups:
        with contextlib.closing(draw(count)) as groups:
            while True:
                began = self._timeline.now()
                if (group := next(groups, None)) is None:
                    return
                self._timeline.span(DRAFT, "draw", began, drafts=len(group))
                yield group


@dataclass(kw_only=True)
class _RecordedStatistics(DraftStatistics):
    """Tells of each count as well."""

    told: Callable[[int, int], None]

    def note(self, drafted: int, said: int) -> None:
        super().note(drafted, said)
        self.told(drafted, said)
