"""A draft head over one sequence: hidden states of the model in, drafts of the tokens after the next out.

An entry of its cache is a position's hidden state with the token after that position. The equations stand in
`engram_export.draft_head`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor, StepInputs, allocate_states
from engram_runtime.manifest import DRAFT_HEAD, NEXT_HIDDEN


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """What a head makes of T entries.

    Attributes:
        logits: ``[R, n]``, of the ids of `DraftHead.vocabulary`.
        hidden: ``[T, D]``, which stand in for the model's where a chain goes on.
    """

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]


class DraftHead:
    """The head's cache for one sequence.

    Attributes:
        vocabulary: ``[n]`` int64, the ids of the tokens it tells apart, in the order of its logits.
    """

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        """Start with no entries.

        Raises:
            BundleError: the bundle has no draft head, or its ids are not those of tokens.
        """
        specs = bundle.manifest.graph(DRAFT_HEAD).states
        self.vocabulary = bundle.draft_vocabulary()
        self._context_length = bundle.manifest.model.context_length
        self._executor = executor
        self._step = executor.bind(allocate_states(specs, executor.float16_states), DRAFT_HEAD)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, token_ids: Sequence[int], hidden: NDArray[np.float32], *, every_row: bool = False) -> Drafted:
        """Add T entries.

        Args:
            token_ids: ``[T]``, the token after each position; that of id 0 stands in for one that is no token.
            hidden: ``[T, D]`` of each position, from `engram_runtime.session.Session.hidden`.
            every_row: for logits of all entries instead of the last one's.

        Raises:
            RequestError: no entry, another number of hidden states, or more entries than the context holds.
        """
        ids = np.maximum(np.asarray(token_ids, dtype=np.int64), 0)
        self._check(len(ids), len(hidden))
        parts, start = [], 0
        for size in self._executor.chunks(len(ids), self._context_length - len(self) - len(ids)):
            parts.append(self._pass(ids[start : start + size], hidden[start : start + size], every_row=every_row))
            start += size
        logits = [part.logits for part in (parts if every_row else parts[-1:])]
        return Drafted(np.concatenate(logits), np.concatenate([part.hidden for part in parts]))

    def draft(self, token_ids: Sequence[int], hidden: NDArray[np.float32], count: int) -> list[int]:
        """Add T entries and draft the most likely ``count`` tokens after the last of ``token_ids``, one by one.

        Later drafts go on from the head's own hidden states; the entries made for them are forgotten.
        """
        drafted = self.extend(token_ids, hidden)
        kept, drafts = len(self), [self._best(drafted)]
        while len(drafts) < count:
            drafted = self.extend(drafts[-1:], drafted.hidden[-1:])
            drafts.append(self._best(drafted))
        self.trim(len(self) - kept)
        return drafts

    def trim(self, count: int) -> None:
        """Forget the last ``count`` entries, as if they had never been added."""
        if not 0 <= count <= len(self):
            raise RequestError(f"can't trim {count} entries of a draft head of {len(self)}")
        self._length -= count

    def _pass(self, token_ids: NDArray[np.int64], hidden: NDArray[np.float32], *, every_row: bool) -> Drafted:
        count = len(token_ids)
        logits = self._step(
            StepInputs(
                token_ids=token_ids,
                position=self._length,
                logit_rows=np.arange(0 if every_row else count - 1, count, dtype=np.int64),
                rows={},
                hidden=hidden,
            )
        )
        self._length += count
        return Drafted(logits, self._step.told[NEXT_HIDDEN])

    def _best(self, drafted: Drafted) -> int:
        return int(self.vocabulary[drafted.logits[-1].argmax()])

    def _check(self, tokens: int, states: int) -> None:
        if tokens == 0 or tokens != states:
            raise RequestError(f"{tokens} tokens and {states} hidden states were given; expected as many of both")
        if (total := len(self) + tokens) > self._context_length:
            raise RequestError(f"{total} entries exceed the context of {self._context_length}")
