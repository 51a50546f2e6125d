"""Slots: sequences that texts take in turn, each of which keeps its tokens for one that begins alike."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from engram_runtime.sequences import common_length
from engram_runtime.session import Session


@dataclass(eq=False, slots=True)
class Slot:
    """A sequence; ``place`` is that among the slots.

    Attributes:
        busy: whether a text has it.
        released: when it was given back, counted from 1 by all slots.
    """

    place: int
    session: Session
    busy: bool = False
    released: int = 0


class Slots:
    """Sessions of one bundle and executor."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._slots = [Slot(place, session) for place, session in enumerate(sessions)]
        self._rolls_back = all(spec.rolls_back for spec in sessions[0].state_specs)
        self._releases = itertools.count(1)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> list[Slot]:
        """Those that no text has."""
        return [slot for slot in self._slots if not slot.busy]

    @property
    def cached_tokens(self) -> int:
        """How many tokens all of them hold."""
        return sum(len(slot.session) for slot in self._slots)

    def take(self, prompt_ids: Sequence[int]) -> Slot:
        """Return the free slot whose text a prompt goes on with, of several that with most of it.

        Where it goes on with none, and of equal ones, it is the one that has been free for longest: what prompts of a
        kind begin with is copied from another, whose own text isn't lost for it.
        """
        slot = max(self.free, key=lambda slot: (_continued(slot, prompt_ids), -slot.released))
        slot.busy = True
        return slot

    def begin(self, slot: Slot, prompt_ids: Sequence[int]) -> None:
        """Make a slot hold what any of them has computed of a prompt, but for its last token.

        States that don't all roll back can't be copied from the middle of another text, nor stand there in their own
        but where they have a copy to go back to.
        """
        session = slot.session
        best = max(self._slots, key=lambda other: (_shared(other, prompt_ids), other is slot))
        if self._rolls_back and best is not slot:
            session.copy(best.session, _shared(best, prompt_ids))
        session.trim(len(session) - _shared(slot, prompt_ids))
        session.trim(session.put_off)  # so that these are computed in parts, like the rest

    def release(self, slot: Slot) -> None:
        """Have a slot free again."""
        slot.busy, slot.released = False, next(self._releases)


def _shared(slot: Slot, prompt_ids: Sequence[int]) -> int:
    """Return how much of a prompt a slot holds, but for its last token, after which logits are wanted."""
    return min(common_length(slot.session.token_ids, prompt_ids), len(prompt_ids) - 1)


def _continued(slot: Slot, prompt_ids: Sequence[int]) -> int:
    """Return how much of a prompt a slot holds, 0 where that is the lesser part of its own tokens."""
    shared = _shared(slot, prompt_ids)
    return shared if 2 * shared >= len(slot.session) else 0
