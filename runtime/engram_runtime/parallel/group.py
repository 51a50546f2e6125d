"""Sequences that go on from one session's tokens and are run together."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError
from engram_runtime.executor import Batching, OnDevice, State, state_bytes
from engram_runtime.manifest import StateSpec
from engram_runtime.memory import free_memory
from engram_runtime.parallel.passes import JointPasses
from engram_runtime.parallel.shared_states import SharedStates
from engram_runtime.parallel.steps import JointStep
from engram_runtime.sequences import require_vocabulary
from engram_runtime.session import Session

MOST_SEQUENCES = 1024  # that are asked for at once; far more than pay


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
    """Several continuations of a session, a token or more each at every step; close it, best by ``with``.

    Their logits have the bits of a session that is alone with its tokens. They share the memory of what the session
    holds when the group begins, and of it each has only what it changes; the session and they don't disturb one
    another. Where a step raises, it has added nothing; it can be repeated where all states roll back, else the group is
    to be closed.
    """

    def __init__(self, session: Session, count: int) -> None:
        """Fork a session ``count`` times.

        Raises:
            RequestError: there is no memory for so many, or the session's caches lie on a device.
        """
        if isinstance(session.executor, OnDevice):
            raise RequestError(
                f"several continuations share the caches of their text, which lie on {session.executor.caches_on}; "
                "ask for one, or use a library for a processor"
            )
        self._model = session.model
        self._executor = session.executor
        self._unused: list[Mapping[str, State]] = []  # states of sequences that were dropped
        self._step: JointStep | None = None  # bound when it is first needed
        self._start = len(session)
        self._rolls_back = all(spec.rolls_back for spec in session.state_specs)
        with contextlib.ExitStack() as opened:
            self._shared = SharedStates(session.state_specs, session.states, len(session))
            opened.callback(self._shared.close)
            self._sequences = [_Sequence(self._shared.fork(), list(session.token_ids)) for _ in range(count)]
            self._passes = JointPasses(session)
            opened.pop_all()

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def room(self) -> int:
        """How many more tokens the context of each holds."""
        return self._model.context_length - max((len(each.token_ids) for each in self._sequences), default=0)

    @property
    def spare(self) -> int:
        """How many tokens a step can take beyond one for each sequence in the same time, which may then be trimmed.

        0 where a state can't step back, as windows and recurrent ones can't.
        """
        batching = self._executor if isinstance(self._executor, Batching) else None
        return batching.spare_rows(len(self)) if batching and self._rolls_back else 0

    def token_ids(self, index: int) -> Sequence[int]:
        """Ids of all tokens of a sequence, those of the session first: a view, not to be changed."""
        return self._sequences[index].token_ids

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Add a token to each sequence and return the logits ``[B, V]`` after them.

        Raises:
            RequestError, TableError: as for `extend`.
        """
        return np.concatenate(self.extend([[token_id] for token_id in token_ids]))

    def extend(self, blocks: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Add a block of K tokens to each sequence, K of its own, and return the logits ``[K, V]`` after each token.

        Raises:
            RequestError: not a block for each, none or several tokens where the states take one at a time, one outside
                the vocabulary, or no room in the context.
            TableError: a table's file no longer holds its rows.
        """
        self._check(blocks)
        logits = self._run(blocks)
        for sequence, block in self._with(blocks):
            sequence.token_ids += block
        return np.split(logits, np.cumsum([len(block) for block in blocks])[:-1])

    def trim(self, counts: Sequence[int]) -> None:
        """Forget the last tokens of each sequence, so many of it, that `extend` has added.

        Raises:
            RequestError: not a count for each, or more than it has added; nothing has changed.
        """
        added = [len(each.token_ids) - self._start for each in self._sequences]
        most = added if self._rolls_back else [0] * len(added)
        if len(counts) != len(most) or not all(0 <= count <= of for count, of in zip(counts, most, strict=True)):
            raise RequestError(f"can't trim {list(counts)} tokens of sequences that can forget up to {most}")
        for sequence, count in zip(self._sequences, counts, strict=True):
            del sequence.token_ids[len(sequence.token_ids) - count :]

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
        self._step = None

    def _fork(self, sequence: _Sequence) -> _Sequence:
        states = self._unused.pop() if self._unused else self._shared.fork()
        self._shared.copy(sequence.states, states, len(sequence.token_ids))
        return _Sequence(states, list(sequence.token_ids))

    def _run(self, blocks: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the logits ``[R, V]`` after each of all tokens, in as few passes as there can be."""
        step = self._step = self._step or JointStep(self._executor, [each.states for each in self._sequences])
        histories = [each.token_ids for each in self._sequences]
        return self._passes.run(step, range(len(self)), histories, blocks).logits

    def _with(self, blocks: Sequence[Sequence[int]]) -> Iterator[tuple[_Sequence, Sequence[int]]]:
        return zip(self._sequences, blocks, strict=True)

    def _check(self, blocks: Sequence[Sequence[int]]) -> None:
        if len(blocks) != len(self):
            raise RequestError(f"tokens were given for {len(blocks)} sequences, there are {len(self)}")
        for sequence, block in self._with(blocks):
            self._check_block(block, self._model.context_length - len(sequence.token_ids))

    def _check_block(self, token_ids: Sequence[int], room: int) -> None:
        if not token_ids or (len(token_ids) > 1 and not self._rolls_back):
            wanted = "at least one" if self._rolls_back else "one, as not all of its states roll back"
            raise RequestError(f"{len(token_ids)} tokens were given to a sequence, expected {wanted}")
        require_vocabulary(token_ids, self._model.vocab_size)
        if len(token_ids) > room:
            raise RequestError(f"a sequence fills the context of {self._model.context_length}; keep the others")

    def close(self) -> None:
        """End the sequences, once however often it is called; the session stays open."""
        self._passes.close()
        self._shared.close()
        self._sequences, self._unused, self._step = [], [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
