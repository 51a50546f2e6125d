"""Forward passes over blocks of tokens of several sequences, with their rows on the way."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.activity import Values
from engram_runtime.executor import BatchInputs, PendingRows, empty_rows
from engram_runtime.forking import check_process
from engram_runtime.parallel.rows import JointRows
from engram_runtime.parallel.steps import JointStep
from engram_runtime.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class JointPass:
    """What came of the R tokens of all blocks.

    Attributes:
        logits: ``[R, V]`` after each.
        told: beside the logits, ``[R, ...]`` by name; see `engram_runtime.executor.Step`.
        row_ids: that were read, ``[R, C]`` by site; of no site with tables off.
    """

    logits: NDArray[np.float32]
    told: Mapping[str, Values]
    row_ids: Mapping[str, NDArray[np.int64]]


class JointPasses:
    """Runs sequences like a session; to be closed."""

    def __init__(self, session: Session) -> None:
        self._sites = session.sites
        self._read = session.sites if session.tables_on else ()
        self._width = session.model.hidden_size if session.takes_embeddings else None
        self._rows = JointRows(self._read)
        self._process = os.getpid()

    def run(
        self,
        step: JointStep,
        places: Sequence[int],
        histories: Sequence[Sequence[int]],
        blocks: Sequence[Sequence[int]],
    ) -> JointPass:
        """Add blocks of tokens, in as few passes as there can be.

        Args:
            places: of their sequences among those that the step is bound to.
            histories: what the sequences hold.

        Raises:
            ForkError: this process was forked from the one that began.
            TableError: a table's file no longer holds its rows.
        """
        check_process(self._process)
        of_each = [
            (place, len(history) + k)
            for place, history, block in zip(places, histories, blocks, strict=True)
            for k in range(len(block))
        ]
        sequences, positions = (list(each) for each in zip(*of_each, strict=True))
        token_ids = np.array(list(itertools.chain.from_iterable(blocks)), dtype=np.int64)
        request = self._rows.request(histories, blocks) if self._read else None
        rows_of = request.part if request else self._empty
        logits, told = [], []
        for part in step.parts(len(token_ids)):
            inputs = BatchInputs(
                sequences=sequences[part],
                token_ids=token_ids[part],
                positions=np.array(positions[part], dtype=np.int64),
                rows=rows_of(part),
                embeddings=self._unread_embeddings(part.stop - part.start),
            )
            logits.append(step(inputs))
            told.append(step.told)
        return JointPass(np.concatenate(logits), _joined(told), request.row_ids if request else {})

    def _empty(self, part: slice) -> Mapping[str, PendingRows]:
        return {site.name: empty_rows(site.spec, part.stop - part.start) for site in self._sites}

    def _unread_embeddings(self, count: int) -> NDArray[np.float32] | None:
        return None if self._width is None else np.zeros((count, self._width), dtype=np.float32)

    def close(self) -> None:
        """End its thread, once however often it is called; a forked process has none."""
        if os.getpid() == self._process:
            self._rows.close()


def _joined(told: Sequence[Mapping[str, Values]]) -> Mapping[str, Values]:
    if len(told) == 1:
        return told[0]
    return {name: np.concatenate([each[name] for each in told]) for name in told[0]}
