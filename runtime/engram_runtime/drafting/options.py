"""How the user wants tokens to be drafted."""

from dataclasses import dataclass

from engram_runtime.drafting import head, lookup
from engram_runtime.errors import RequestError

NONE = "none"
DRAFTERS = (NONE, lookup.NAME, head.NAME)
MOST_DRAFTS = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions:
    """Who drafts, and how many tokens a forward pass.

    Attributes:
        drafter: one of `DRAFTERS`: ``none``; ``lookup`` for what followed the last few tokens where they stood before;
            ``mtp`` for the bundle's draft head.
        drafts: a fixed number, or None for what measurement recommends, see `engram_runtime.drafting.schedule`.
    """

    drafter: str = NONE
    drafts: int | None = None

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise RequestError(f"drafter {self.drafter!r} is unknown; there are {', '.join(DRAFTERS)}")
        if self.drafts is not None and not 0 <= self.drafts <= MOST_DRAFTS:
            raise RequestError(f"drafts are {self.drafts}, expected 0 to {MOST_DRAFTS}")
        if self.drafts is not None and self.drafter == NONE:
            raise RequestError("a number of drafts was given, but no drafter; choose one or leave out the number")


NO_DRAFTS = DraftOptions()
