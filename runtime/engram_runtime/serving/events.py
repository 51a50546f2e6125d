"""What a serving engine tells of a text while it generates it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engram_runtime.errors import EngramError
from engram_runtime.generation import Generation


@dataclass(frozen=True, slots=True)
class SiteReading:
    """What a site did in the forward pass that led to a token, at the position before it.

    Attributes:
        row_ids: read there.
        gate: mean over the residual streams of what their value was multiplied by, 0 to 1.
        contribution: norm of what the site added over the streams' norm before.
    """

    row_ids: Sequence[int]
    gate: float
    contribution: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token that was said.

    Attributes:
        piece: text that is certain now and was not before; it may be of earlier tokens, or empty.
        logprob: natural logarithm of its probability by the model, before temperature, penalties, bias, limits and
            grammar; None where it wasn't asked for.
        top: the likeliest tokens there and their log-probabilities, the likeliest first.
        sites: by name; None where it wasn't asked for, or where the bundle doesn't tell.
    """

    token_id: int
    piece: str
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    sites: Mapping[str, SiteReading] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of a text.

    Attributes:
        piece: the rest of it.
        generation: whole; its ``finish_reason`` may also be ``time``. Its times begin when it left the queue, and
            ``prefilled_tokens`` counts what the cache didn't have.
        queued_s: seconds in the queue before.
    """

    piece: str
    generation: Generation
    queued_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A text that can't be finished, and why."""

    error: EngramError


Event = Token | Finished | Failed
