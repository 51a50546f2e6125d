"""Generation that verifies drafts, several tokens a forward pass: the text of plain decoding, for any drafter.

A pass takes the pending token, which was said but isn't held yet, and the drafts after it. Its rows are chosen from in
turn, as they are asked for, until one isn't the draft. What is rejected never happened: neither the session nor the
random generator nor the tokens that penalties see differ from plain decoding, whenever the generator is left.
"""

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.acceptance import Choice
from engram_runtime.drafting.drafter import Draft, Drafter
from engram_runtime.drafting.schedule import Pass, Schedule
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import RequestError, TableError
from engram_runtime.generation import Tokens
from engram_runtime.sequences import common_length
from engram_runtime.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class Speculation:
    """What it takes beside a session: who drafts, how many, how tokens are chosen, and where all that is counted."""

    drafter: Drafter
    schedule: Schedule
    choose: Choice
    statistics: DraftStatistics


def decode_drafted(
    session: Session,
    logits: NDArray[np.float32],
    speculation: Speculation,
    *,
    max_tokens: int,
    end_ids: Collection[int],
) -> Tokens:
    """Yield up to ``max_tokens`` ids, the end token included if one comes: those of `generation.decode_tokens`.

    While it is suspended the session may hold tokens that were not yielded yet; closing it trims them.

    Args:
        logits: ``[V]`` after the session's last token.

    Raises:
        RequestError: the drafter proposes what is no token.
    """
    speculation.schedule.begin()
    _tell(speculation.drafter, session)
    history = list(session.token_ids)
    token_id = speculation.choose(logits, history, None)
    yield token_id
    count = 1
    while token_id not in end_ids and count < max_tokens and session.room:
        most = min(max_tokens - count, session.room) - 1  # a pass says one token more than it has drafts
        with _verified(session, speculation, token_id, most, vocab_size=len(logits)) as block:
            for row, draft in zip(block.rows, [*block.drafts, None], strict=True):
                history.append(block.token_ids[block.said])
                block.said += 1
                yield (token_id := speculation.choose(row, history, draft))
                if draft is None or token_id != draft.token_id or token_id in end_ids:
                    break
        count += block.said


def _tell(drafter: Drafter, session: Session) -> None:
    """Have a drafter know the tokens that a session holds."""
    shared = common_length(drafter.token_ids, session.token_ids)
    drafter.forget(len(drafter.token_ids) - shared)
    drafter.add(session.token_ids[shared:], session.hidden)


@dataclass(slots=True, eq=False)
class _Block:
    """A pass: a pending token, its drafts and ``rows [1 + k, V]`` of logits after each of them.

    ``said`` counts the tokens that were chosen from the rows; all but the last of them are drafts.
    """

    pending: int
    drafts: Sequence[Draft]
    rows: NDArray[np.float32]
    said: int = 0

    @property
    def token_ids(self) -> list[int]:
        return [self.pending, *(draft.token_id for draft in self.drafts)]


@contextlib.contextmanager
def _verified(
    session: Session, speculation: Speculation, pending: int, most: int, *, vocab_size: int
) -> Iterator[_Block]:
    """Add a token and up to ``most`` drafts after it; on leaving, trim those that weren't said."""
    start, put_off, began = len(session), session.put_off, time.perf_counter()
    drafts, grade, asked = _draft(session, speculation, pending, most, vocab_size)
    drafted = time.perf_counter()
    block = _run(session, pending, drafts)
    verified = time.perf_counter()
    hidden = session.hidden
    read = time.perf_counter()
    try:
        yield block
    finally:
        closed = time.perf_counter()
        if session.token_ids[start:] == block.token_ids:  # else someone went on with the session meanwhile
            session.trim(len(block.token_ids) - block.said)
            speculation.drafter.add(block.token_ids[: block.said], hidden[: block.said])
        draft_s = drafted - began + read - verified + time.perf_counter() - closed
        speculation.statistics.note(len(block.drafts), block.said)
        speculation.schedule.note(
            Pass(
                grade=grade,
                asked=asked,
                drafted=len(block.drafts),
                put_off=put_off,
                said=block.said,
                draft_s=draft_s,
                forward_s=verified - drafted,
            )
        )


def _draft(
    session: Session, speculation: Speculation, pending: int, most: int, vocab_size: int
) -> tuple[list[Draft], int, int]:
    """Return drafts after ``pending``, whose rows are on their way, their grade and how many were asked for."""
    proposal = speculation.drafter.propose(pending)
    count = speculation.schedule.count(proposal.grade, min(most, proposal.most), session.put_off)
    drafts: list[Draft] = []
    with contextlib.closing(proposal.draw(count)) as groups:
        while len(drafts) < count and (group := next(groups, None)):
            _check(speculation.drafter.name, group, vocab_size)
            drafts += group
            session.request([pending, *(draft.token_id for draft in drafts)])
    return drafts[:count], proposal.grade, count


def _check(name: str, drafts: Sequence[Draft], vocab_size: int) -> None:
    for draft in drafts:
        if not 0 <= draft.token_id < vocab_size:
            raise RequestError(
                f"drafter {name!r} proposes token id {draft.token_id}, outside the vocabulary of {vocab_size}"
            )


def _run(session: Session, pending: int, drafts: Sequence[Draft]) -> _Block:
    """Run a token and its drafts, or the token alone where rows of a draft can't be read, which may never be needed."""
    start = len(session)
    if drafts:
        session.checkpoint()
    try:
        rows = session.decode([pending, *(draft.token_id for draft in drafts)])
    except BaseException as error:
        session.trim(len(session) - start)  # of a pass in chunks some may have been added
        if not drafts or not isinstance(error, TableError):
            raise
        drafts = ()
        rows = session.decode([pending])
    return _Block(pending, drafts, rows)
