"""Sequences that go on from one session's tokens and are run together."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError
from engram_runtime.executor import BatchInputs, BatchStep, PendingRows, State, empty_rows, state_bytes
from engram_runtime.manifest import StateSpec
from engram_runtime.memory import free_memory
from engram_runtime.parallel.rows import JointRows
from engram_runtime.parallel.shared_states import SharedStates
from engram_runtime.parallel.steps import bind_sequences
from engram_runtime.session import Session


def require_memory(session: Session, count: int, max_tokens: int) -> None:
    """Check that memory is free for all that a group may come to change of its states.

    Args:
        count: the most sequences it has at once.
        max_tokens: the most that each takes; the context may hold fewer.

    Raises:
        RequestError: it isn't.
    """
    # The system maps more than it has, each page being the session's until it is changed, and ends the process then.
    tokens = min(max_tokens, session.model.context_length - len(session))
    narrow = session.executor.float16_states
    needed = count * sum(_changed_bytes(spec, narrow, tokens) for spec in session.state_specs)
    free = free_memory().num_bytes
    if needed > free:
        raise RequestError(
            f"the states of {count} sequences of {tokens} tokens need {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB of memory are available; ask for fewer sequences or tokens"
        )


def _changed_bytes(spec: StateSpec, float16_states: Collection[str], tokens: int) -> int:
    """Return how much of a state is written while a sequence takes tokens."""
    whole = state_bytes([spec], float16_states)
    return whole // spec.shape[-2] * tokens if spec.rolls_back else whole


@dataclass(slots=True)
class _Sequence:
    states: Mapping[str, State]
    token_ids: list[int]


class Group:
    """Several continuations of a session, a token each at every step; close it, best by ``with``.

    Their logits have the bits of a session that is alone with its tokens. They share the memory of what the session
    holds when the group begins, and of it each has only what it changes; the session and they don't disturb one
    another. Where a step raises, the group is to be closed.
    """

    def __init__(self, session: Session, count: int) -> None:
        """Fork a session ``count`` times.

        Raises:
            RequestError: there is no memory for so many.
        """
        self._model = session.model
        self._executor = session.executor
        self._sites = session.sites
        self._tables_on = session.tables_on
        self._takes_embeddings = session.takes_embeddings
        self._unused: list[Mapping[str, State]] = []  # states of sequences that were dropped
        self._steps: list[tuple[BatchStep, slice]] = []  # with the sequences of each, bound when they are first needed
        with contextlib.ExitStack() as opened:
            self._shared = SharedStates(session.state_specs, session.states, len(session))
            opened.callback(self._shared.close)
            self._sequences = [_Sequence(self._shared.fork(), list(session.token_ids)) for _ in range(count)]
            self._rows = JointRows(session.sites if session.tables_on else ())
            opened.pop_all()

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def room(self) -> int:
        """How many more tokens the context of each holds."""
        return self._model.context_length - max((len(each.token_ids) for each in self._sequences), default=0)

    def token_ids(self, index: int) -> Sequence[int]:
        """Ids of all tokens of a sequence, those of the session first: a view, not to be changed."""
        return self._sequences[index].token_ids

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Add a token to each sequence and return the logits ``[B, V]`` after them.

        Raises:
            RequestError: not a token for each, one outside the vocabulary, or no room in the context.
            TableError: a table's file no longer holds its rows.
        """
        self._check(token_ids)
        if not self._steps:
            self._steps = bind_sequences(self._executor, [each.states for each in self._sequences])
        ids = np.array(token_ids, dtype=np.int64)
        logits = [self._run(step, self._sequences[part], ids[part]) for step, part in self._steps]
        for sequence, token_id in zip(self._sequences, token_ids, strict=True):
            sequence.token_ids.append(token_id)
        return np.concatenate(logits)

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with these sequences in this order: one that is named twice is forked, one that isn't ends.

        Args:
            indices: ``[B]`` places among the sequences so far; B is the number of them from now on.

        Raises:
            RequestError: no sequence has that place; nothing has changed.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise RequestError(f"there is no sequence {index} to keep among {len(self)}, which count from 0")
        if list(indices) == list(range(len(self))):
            return
        kept: list[_Sequence] = []
        named: set[int] = set()
        self._unused += [each.states for i, each in enumerate(self._sequences) if i not in indices]
        for index in indices:
            kept.append(self._fork(self._sequences[index]) if index in named else self._sequences[index])
            named.add(index)
        self._sequences = kept
        self._steps = []

    def _fork(self, sequence: _Sequence) -> _Sequence:
        states = self._unused.pop() if self._unused else self._shared.fork()
        self._shared.copy(sequence.states, states, len(sequence.token_ids))
        return _Sequence(states, list(sequence.token_ids))

    def _run(
        self, step: BatchStep, sequences: Sequence[_Sequence], token_ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        positions = np.array([len(each.token_ids) for each in sequences], dtype=np.int64)
        rows = self._pending_rows(sequences, token_ids)
        unread = (
            np.zeros((len(token_ids), self._model.hidden_size), dtype=np.float32) if self._takes_embeddings else None
        )
        return step(BatchInputs(token_ids=token_ids, positions=positions, rows=rows, embeddings=unread))

    def _pending_rows(self, sequences: Sequence[_Sequence], token_ids: NDArray[np.int64]) -> Mapping[str, PendingRows]:
        if not self._tables_on:
            return {site.name: empty_rows(site.spec, len(token_ids)) for site in self._sites}
        return self._rows.rows([each.token_ids for each in sequences], token_ids)

    def _check(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) != len(self):
            raise RequestError(f"{len(token_ids)} tokens were given to {len(self)} sequences, expected one for each")
        for token_id in token_ids:
            if not 0 <= token_id < self._model.vocab_size:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {self._model.vocab_size}")
        if self.room < 1:
            raise RequestError(f"a sequence fills the context of {self._model.context_length}; keep the others")

    def close(self) -> None:
        """End the sequences, once however often it is called; the session stays open."""
        self._rows.close()
        self._shared.close()
        self._sequences, self._unused, self._steps = [], [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
