"""What a bundle's tables are worth: the same text or questions with other rows, and with none."""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import EngramError
from engram_runtime.evaluation.answers import FIGURES, Answer, of_kind
from engram_runtime.evaluation.intervals import share, share_difference
from engram_runtime.evaluation.texts import perplexity, perplexity_ratio
from engram_runtime.keyers import NO_ROW
from engram_runtime.lens.repack_errors import DTYPES, LARGEST, NOT_INSTALLED, REPACKING
from engram_runtime.session import Session
from engram_runtime.site import Site
from engram_runtime.tables.changed import ConvertedTable, PermutedTable
from engram_runtime.tables.store import TableStore
from engram_runtime.tables.zeros import ZeroTable

SEED = 0
ON, OFF = "as it is", "tables off"
Run = tuple[Sequence[int], Sequence[int]]  # tokens that are read, after the ones before them
Figures = dict[str, Any]
Result = TypeVar("Result")
Measured = Sequence[tuple["Condition", Result | None]]  # the bundle as it is first; None where it can't be measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What is changed: by site, the table in place of its own; or why that can't be measured."""

    name: str
    tables: Mapping[str, TableStore]
    reason: str | None = None


def conditions(sites: Sequence[Site], runs: Sequence[Run]) -> Iterator[Condition]:
    """Yield what is to be measured beside a bundle as it is.

    Tables off, all of them and each alone; rows in one another's place, among those that the ``runs`` read, so that
    each n-gram gets another's row of its own hash head; and rows quantised to fewer bytes than they have.
    """
    yield Condition(name=OFF, tables={site.name: ZeroTable() for site in sites})
    if len(sites) > 1:
        yield from (Condition(name=f"{site.name} off", tables={site.name: ZeroTable()}) for site in sites)
    yield Condition(name="rows shuffled", tables={site.name: shuffled(site, runs) for site in sites})
    yield from (_requantised(sites, dtype) for dtype in DTYPES)


def ablate(session: Session, changed: Sequence[Condition], measure: Callable[[], Result]) -> Measured[Result]:
    """Return what is measured of a session as it is, and under conditions."""
    found: list[tuple[Condition, Result | None]] = [(Condition(name=ON, tables={}), measure())]
    for condition in changed:
        with exchanged(session, condition.tables):
            found.append((condition, measure() if condition.reason is None else None))
    return found


@contextlib.contextmanager
def exchanged(session: Session, tables: Mapping[str, TableStore]) -> Iterator[None]:
    """Have the sites of a session read other tables; it forgets its tokens, before and after."""
    own = [(site, site.table) for site in session.sites]
    session.trim(len(session))
    try:
        for site, table in own:
            site.table = tables.get(site.name, table)
        yield
    finally:
        for site, table in own:
            site.table = table
        session.trim(len(session))


def shuffled(site: Site, runs: Sequence[Run]) -> PermutedTable:
    """Return a site's table with the rows that runs read in one another's place, column by column."""
    rng = np.random.default_rng(SEED)
    row_ids = np.concatenate([site.keyer.row_ids(before, np.asarray(ids, dtype=np.int64)) for before, ids in runs])
    columns = [np.unique(column[column != NO_ROW]) for column in row_ids.T]
    read, others = np.concatenate(columns), np.concatenate([rng.permutation(column) for column in columns])
    order = read.argsort()
    return PermutedTable(site.table, read[order], others[order])


def _requantised(sites: Sequence[Site], dtype: str) -> Condition:
    """Return the condition of rows in a format, where it makes any of them smaller and is at hand."""
    name = f"rows as {dtype}"
    try:
        repack = importlib.import_module(REPACKING)
        tables = {}
        for site in sites:
            record = repack.repacked_format(site.spec.record.columns, dtype)
            if record.record_bytes < site.spec.record.record_bytes:
                tables[site.name] = ConvertedTable(site.table, _Requantiser(repack, record))
    except ModuleNotFoundError as error:
        return Condition(name=name, tables={}, reason=NOT_INSTALLED.format(error.name))
    except EngramError as error:
        return Condition(name=name, tables={}, reason=f"not measured: {error}")
    reason = None if tables else "not measured: rows have as few bytes already"
    return Condition(name=name, tables=tables, reason=reason)


@dataclass(frozen=True, slots=True)
class _Requantiser:
    """Quantises rows ``[N, columns]`` and decodes them again; those that float16 scales can't hold stay as they are."""

    repack: Any
    record: Any

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        fitting = (np.abs(rows) <= LARGEST).all(axis=1)
        changed = rows.copy()
        changed[fitting] = self.record.decode(self.repack.encode_rows(rows[fitting], self.record))
        return changed


def text_figures(measured: Measured[NDArray[np.float64]]) -> list[Figures]:
    """Return the perplexity of each condition from its ``[N]`` losses, and its ratio to the bundle's as it is."""
    before = _as_it_is(measured)
    return [
        _figures(condition, losses, lambda of: {"perplexity": perplexity(of), "ratio": perplexity_ratio(of, before)})
        for condition, losses in measured
    ]


def question_figures(measured: Measured[Sequence[Answer]]) -> list[Figures]:
    """Return the share of right answers of each condition by kind of question, and how much larger it became."""
    before = _as_it_is(measured)
    return [_figures(condition, answers, lambda of: _by_kind(of, before)) for condition, answers in measured]


def _figures(condition: Condition, found: Result | None, make: Callable[[Result], Figures]) -> Figures:
    if found is None:
        return {"condition": condition.name, "not_measured": condition.reason}
    return {"condition": condition.name, **make(found)}


def _as_it_is(measured: Measured[Result]) -> Result:
    (_, found), *_ = measured
    assert found is not None
    return found


def _by_kind(answers: Sequence[Answer], before: Sequence[Answer]) -> Figures:
    found = {}
    for kind in FIGURES:
        right, was = ([answer.right() for answer in of_kind(each, kind)] for each in (answers, before))
        if right:
            pairs = Counter(zip(right, was, strict=True))
            difference = share_difference(pairs[True, False], pairs[False, True], len(right))
            found[kind] = {"right": share(sum(right), len(right)), "difference": difference}
    return found
