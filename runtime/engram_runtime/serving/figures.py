"""What an engine tells of its own work."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepFigures:
    """A forward pass, or several right after each other where one can't hold all.

    Attributes:
        texts: that were given a token or more; 0 where it took tokens of a prompt.
        prompt_tokens: that it took.
    """

    seconds: float
    texts: int
    prompt_tokens: int


def unwatched(figures: StepFigures) -> None:
    """Take no note of it."""
