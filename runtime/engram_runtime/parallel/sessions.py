"""Sessions over the same tables that decode together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.activity import Activity, SiteActivity, activity_of
from engram_runtime.executor import Batching
from engram_runtime.parallel.passes import JointPasses
from engram_runtime.parallel.steps import JointStep
from engram_runtime.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What came of a token each of R sessions.

    Attributes:
        logits: ``[R, V]``, each with the bits of a session that is alone.
        activity: see `Session.activity`; T is R.
        row_ids: that were read, ``[R, C]`` by site; of no site with tables off.
    """

    logits: NDArray[np.float32]
    activity: Activity
    row_ids: Mapping[str, NDArray[np.int64]]


class JointSessions:
    """Decodes with some of several sessions at once where the executor can, else one after the other.

    Each of them can be used by itself in between, from the same thread; close it before them.

    Attributes:
        at_once: whether the executor can.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        """Take sessions of one bundle and executor."""
        self._sessions = sessions
        self.at_once = isinstance(sessions[0].executor, Batching)
        self._passes = JointPasses(sessions[0])
        self._step: JointStep | None = None  # bound when it is first needed

    def decode(self, places: Sequence[int], token_ids: Sequence[int]) -> Decoded:
        """Add a token of the vocabulary to each of the sessions at ``places [R]``, whose contexts have room.

        Raises:
            TableError: a table's file no longer holds its rows; none of the sessions has its token then, or only those
                before the one that failed where they take turns.
        """
        sessions = [self._sessions[place] for place in places]
        if len(places) == 1 or not self.at_once:
            return _joined([_decoded(*each) for each in zip(sessions, token_ids, strict=True)])
        step = self._step = self._step or JointStep(sessions[0].executor, [each.states for each in self._sessions])
        for session in sessions:
            session.lend()
        blocks = [[token_id] for token_id in token_ids]
        made = self._passes.run(step, places, [session.token_ids for session in sessions], blocks)
        for session, block in zip(sessions, blocks, strict=True):
            session.take_back(block)
        return Decoded(made.logits, activity_of(made.told), made.row_ids)

    def close(self) -> None:
        """End its thread, once however often it is called; the sessions stay open."""
        self._passes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _decoded(session: Session, token_id: int) -> Decoded:
    row_ids = row_ids_of(session, session.token_ids, token_id)
    logits = session.decode([token_id])
    return Decoded(logits, _last(session.activity), row_ids)


def _last(activity: Activity) -> Activity:
    return {name: SiteActivity(each.values[-1:]) for name, each in activity.items()}


def row_ids_of(session: Session, history: Sequence[int], token_id: int) -> Mapping[str, NDArray[np.int64]]:
    """Return the ids ``[1, C]`` of the rows that a session reads for a token after others, by site."""
    sites = session.sites if session.tables_on else ()
    return {site.name: site.keyer.row_ids(history, np.array([token_id])) for site in sites}


def _joined(each: Sequence[Decoded]) -> Decoded:
    if len(each) == 1:
        return each[0]
    return Decoded(
        np.concatenate([one.logits for one in each]),
        {name: SiteActivity(np.concatenate([one.activity[name].values for one in each])) for name in each[0].activity},
        {name: np.concatenate([one.row_ids[name] for one in each]) for name in each[0].row_ids},
    )
