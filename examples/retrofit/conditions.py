"""Under which conditions a bundle is asked: with which rows, or none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_export.repack import encode_rows, repacked_format
from engram_runtime.bundle import Bundle
from engram_runtime.executor import Executor
from engram_runtime.records import RecordFormat
from engram_runtime.session import UNLOADED, Session, close_sites, open_sites
from engram_runtime.tables.options import TableOptions
from engram_runtime.tables.overlay_file import OverlaySpec, write_overlay

SHUFFLE_SEED = 0
Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Condition:
    """A name for the report, and what makes the session: overlays over the bundle's table, or no rows at all."""

    name: str
    overlays: tuple[Path, ...] = ()
    tables_on: bool = True

    def session(self, bundle: Bundle, executor: Executor) -> Session:
        """Start an empty sequence under this condition."""
        options = TableOptions(overlays=self.overlays)
        return Session.open(bundle, executor, options=options, tables_on=self.tables_on)


OFF = Condition("off", tables_on=False)


def read_rows(bundle: Bundle, overlays: Sequence[Path] = ()) -> Rows:
    """Return all rows ``[N, d]`` of a bundle's one table, as a site gets them with these overlays."""
    sites = open_sites(bundle, TableOptions(io=UNLOADED.io, overlays=tuple(overlays)))
    try:
        (site,) = sites
        rows = np.empty((site.spec.num_rows, site.spec.record.columns), dtype=np.float32)
        site.table.gather(np.arange(len(rows)), rows)
    finally:
        close_sites(sites)
    return rows


def shuffled(rows: Rows) -> Rows:
    """Return rows ``[N, d]`` of which those that aren't zero have changed places: each n-gram gets another one's."""
    used = np.flatnonzero(rows.any(axis=1))
    result = rows.copy()
    result[used] = rows[np.random.default_rng(SHUFFLE_SEED).permutation(used)]
    return result


def write_float32(path: Path, bundle: Bundle, rows: Rows) -> None:
    """Write an overlay of all rows ``[N, d]`` as they are."""
    record = RecordFormat(payload="float32", columns=rows.shape[1], scale="none", scale_columns=rows.shape[1])
    _write(path, bundle, record, np.ascontiguousarray(rows).view(np.uint8))


def write_int8(path: Path, bundle: Bundle, rows: Rows) -> None:
    """Write an overlay of all rows ``[N, d]`` as int8 with one float16 scale a row, symmetric."""
    record = repacked_format(rows.shape[1], "int8")
    _write(path, bundle, record, encode_rows(rows, record))


def _write(path: Path, bundle: Bundle, record: RecordFormat, records: NDArray[np.uint8]) -> None:
    (table,) = bundle.manifest.tables
    row_ids = np.arange(len(records), dtype=np.int64)
    write_overlay(path, OverlaySpec.of(bundle, table, record), row_ids, records, replace=True)
