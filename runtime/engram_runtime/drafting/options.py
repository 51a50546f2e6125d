"""How the user wants tokens to be drafted."""

from dataclasses import dataclass

from engram_runtime.drafting import head, lookup
from engram_runtime.drafting.mask import MOST_TOKENS
from engram_runtime.errors import RequestError

NONE, MASK, APPROXIMATE_MASK = "none", "mask", "mask-approximate"
MASKS = (MASK, APPROXIMATE_MASK)
DRAFTERS = (NONE, lookup.NAME, head.NAME, *MASKS)
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
        confidence: the least probability of a guess at a mask that is taken, None for 0.9.
    """

    drafter: str = NONE
    drafts: int | None = None
    mask_id: int | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise RequestError(f"drafter {self.drafter!r} is unknown; there are {', '.join(DRAFTERS)}")
        if self.drafts is not None:
            self._check_number(self.drafts)
        if self.drafter not in MASKS and (self.mask_id, self.confidence) != (None, None):
            raise RequestError(
                f"a mask or the confidence in masks was given, which drafter {self.drafter!r} has no use for; leave it "
                f"out or choose {MASK!r}"
            )
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise RequestError(f"confidence is {self.confidence}, expected 0 to 1")

    def _check_number(self, drafts: int) -> None:
        if self.drafter == NONE:
            raise RequestError("a number of drafts was given, but no drafter; choose one or leave out the number")
        most = MOST_TOKENS - 1 if self.drafter in MASKS else MOST_DRAFTS
        if not 0 <= drafts <= most:
            raise RequestError(f"drafts are {drafts}, drafter {self.drafter!r} makes 0 to {most}")


NO_DRAFTS = DraftOptions()
