"""What a worker is told of the bundle it is to open."""

from dataclasses import dataclass
from pathlib import Path

from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.tables.opening import AUTO_OPTIONS
from engram_runtime.tables.options import TableOptions
from engram_runtime.trust.levels import LOCALLY, Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The arguments of `engram_runtime.serving.opening.open_engine`, and those of its options that aren't functions."""

    path: Path
    executor: str
    slots: int
    queue: int
    tables_on: bool = True
    threads: int | None = None
    target: str | None = None
    tables: TableOptions = AUTO_OPTIONS
    drafts: DraftOptions = NO_DRAFTS
    trust: Trust = LOCALLY
