"""How the user wants tokens to be drafted."""

from dataclasses import dataclass

from engram_runtime.drafting import head, lookup
from engram_runtime.errors import RequestError

NONE, MASK, APPROXIMATE_MASK = "none", "mask", "mask-approximate"
DRAFTERS = (NONE, lookup.NAME, head.NAME, MASK, APPROXIMATE_MASK)
MOST_DRAFTS = 63
DEFAULT_MASK_DRAFTS = 3  # what costs little more than none on processors without matrix units


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions:
    """Who drafts, and how many tokens a forward pass.

    Attributes:
        drafter: one of `DRAFTERS`: ``none``; ``lookup`` for what followed the last few tokens where they stood before;
            ``mtp`` for the bundle's draft head; ``mask`` for a model that was trained to guess at masks, and
            ``mask-approximate`` to say its guesses unverified, which is another text.
        drafts: a fixed number, or None for what measurement recommends, see `engram_runtime.drafting.schedule`; for
            masks `DEFAULT_MASK_DRAFTS`.
        mask_id: the token of a mask, or None for that of published models.
        confidence: the least probability of a guess at a mask that is taken.
    """

    drafter: str = NONE
    drafts: int | None = None
    mask_id: int | None = None
    confidence: float = 0.9

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise RequestError(f"drafter {self.drafter!r} is unknown; there are {', '.join(DRAFTERS)}")
        if self.drafts is not None and not 0 <= self.drafts <= MOST_DRAFTS:
            raise RequestError(f"drafts are {self.drafts}, expected 0 to {MOST_DRAFTS}")
        if self.drafts is not None and self.drafter == NONE:
            raise RequestError("a number of drafts was given, but no drafter; choose one or leave out the number")
        if self.mask_id is not None and self.drafter not in (MASK, APPROXIMATE_MASK):
            raise RequestError(f"a mask was given, which drafter {self.drafter!r} has no use for; leave it out")


NO_DRAFTS = DraftOptions()
