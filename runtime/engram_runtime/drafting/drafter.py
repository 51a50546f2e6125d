"""What makes drafts: the protocol."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Groups = Generator[Sequence[int], None, None]
DrawDrafts = Callable[[int], Groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a drafter would say after one token.

    Attributes:
        most: how many drafts it has; 0 where it has no guess.
        grade: how sure it is, in classes of its own, of each of which acceptance is counted by itself.
        draw: makes so many drafts, at most ``most`` and maybe 0, token ids in order, in groups as they come; where it
            has no further guess it ends early. It is closed before the drafter is used again.
    """

    most: int
    grade: int
    draw: DrawDrafts


class Drafter(Protocol):
    """Guesses at a sequence it is told of; ``name`` is how errors and figures call it."""

    @property
    def name(self) -> str: ...

    @property
    def token_ids(self) -> Sequence[int]:
        """All tokens it was told of and didn't forget, not to be changed."""
        ...

    def add(self, token_ids: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """Take note of T more tokens that the session holds.

        Args:
            hidden: ``[N, D]`` of the last N tokens, `engram_runtime.session.Session.hidden`; others are not known.
        """
        ...

    def forget(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        ...

    def propose(self, token_id: int) -> Proposal:
        """Return the guess at what follows ``token_id``, which follows all tokens so far and is the next to be added.

        It is good until the drafter is told of more.
        """
        ...


def no_drafts(count: int) -> Groups:
    """Draw nothing."""
    yield from ()


NOTHING = Proposal(most=0, grade=0, draw=no_drafts)


def is_token(token_id: int) -> bool:
    """Tell a token's id from what stands in the place of a position that was given as an embedding."""
    return token_id >= 0
