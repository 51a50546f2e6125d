"""What drafts came to."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(slots=True, kw_only=True)
class DraftStatistics:
    """Counts of one generation.

    Attributes:
        drafter: its name.
        forwards: passes of the model after the prompt's.
        tokens: said by them.
        drafted, accepted: by position after the pending token, those that were put to the model and came out right.
    """

    drafter: str
    forwards: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def note(self, drafted: int, said: int) -> None:
        """Count a pass that verified so many drafts and said so many tokens, one more than were right."""
        self.forwards += 1
        self.tokens += said
        more = [0] * (drafted - len(self.drafted))
        self.drafted, self.accepted = self.drafted + more, self.accepted + more
        for position in range(drafted):
            self.drafted[position] += 1
            self.accepted[position] += position < said - 1

    def __add__(self, other: Self) -> "DraftStatistics":
        """Return what both counted."""
        return DraftStatistics(
            drafter=self.drafter,
            forwards=self.forwards + other.forwards,
            tokens=self.tokens + other.tokens,
            drafted=_sums(self.drafted, other.drafted),
            accepted=_sums(self.accepted, other.accepted),
        )

    @property
    def tokens_per_forward(self) -> float:
        """Tokens said a pass; 1 without drafts, 0 where there was no pass."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By position, the share of drafts that were right."""
        return [right / made for right, made in zip(self.accepted, self.drafted, strict=True)]

    def figures(self) -> Mapping[str, Any]:
        """Return JSON values."""
        return {
            "draft": self.drafter,
            "forwards": self.forwards,
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "drafted": sum(self.drafted),
            "accepted": sum(self.accepted),
            "acceptance": [round(share, 3) for share in self.acceptance],
        }


def _sums(counts: Sequence[int], others: Sequence[int]) -> list[int]:
    return [sum(pair) for pair in itertools.zip_longest(counts, others, fillvalue=0)]
