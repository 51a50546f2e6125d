"""How many drafts a forward pass verifies."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a pass took and gave.

    Attributes:
        grade: of the drafts, see `engram_runtime.drafting.drafter.Proposal`.
        drafted: how many drafts were verified.
        put_off: tokens computed in addition, `engram_runtime.session.Session.put_off`.
        said: tokens that came of it, one more than drafts were right.
        draft_s: the drafter's seconds.
        forward_s: the model's.
    """

    grade: int
    drafted: int
    put_off: int
    said: int
    draft_s: float
    forward_s: float


class Schedule(Protocol):
    """Chooses the number of drafts."""

    def count(self, grade: int, most: int, put_off: int) -> int:
        """Return how many drafts of a grade to make, 0 to ``most``, where so many tokens were put off."""
        ...

    def note(self, taken: Pass) -> None:
        """Learn from a pass."""
        ...


@dataclass(frozen=True, slots=True)
class Always:
    """As many drafts as there are, up to ``drafts``."""

    drafts: int

    def count(self, grade: int, most: int, put_off: int) -> int:
        """See `Schedule`."""
        return min(self.drafts, most)

    def note(self, taken: Pass) -> None:
        """See `Schedule`: there is nothing to learn."""
