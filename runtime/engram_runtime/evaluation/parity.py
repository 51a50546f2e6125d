"""How far two models are apart on a text: divergence, agreement, and what that does to the perplexity."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import VerificationError
from engram_runtime.evaluation.intervals import share
from engram_runtime.evaluation.losses import log_probabilities
from engram_runtime.evaluation.texts import Progress, Windows, mean_of_tokens, perplexity, perplexity_ratio
from engram_runtime.session import Session

ROWS_AT_ONCE = 64  # of logits whose probabilities are in memory together
Logits = Callable[[Sequence[int]], NDArray[np.float32]]  # tokens [T] of a new sequence to [T, V]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distances:
    """What is compared at each of N tokens of a text, each array ``[N]``.

    Attributes:
        divergence: of Kullback and Leibler, in nats: what is lost by taking the other model's distribution.
        agrees: whether both find the same token likeliest.
        largest: the largest difference of two logits.
        reference_losses, losses: of the token that comes.
    """

    divergence: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    largest: NDArray[np.float32]
    reference_losses: NDArray[np.float64]
    losses: NDArray[np.float64]

    def figures(self) -> dict[str, Any]:
        """Return the means with their intervals, and what is largest."""
        return {
            "tokens": len(self.losses),
            "divergence": mean_of_tokens(self.divergence),
            "max_divergence": float(self.divergence.max()),
            "top1_agreement": share(int(self.agrees.sum()), len(self.agrees)),
            "max_abs": float(self.largest.max()),
            "median_abs": float(np.median(self.largest)),
            "reference_perplexity": perplexity(self.reference_losses),
            "perplexity": perplexity(self.losses),
            "perplexity_ratio": perplexity_ratio(self.losses, self.reference_losses),
        }


def logits_of(session: Session) -> Logits:
    """Return what runs tokens as a new sequence of a session."""

    def run(token_ids: Sequence[int]) -> NDArray[np.float32]:
        session.trim(len(session))
        return np.concatenate(list(session.logits(token_ids)))

    return run


def distances(
    reference: Logits, others: Mapping[str, Logits], windows: Windows, progress: Progress
) -> dict[str, Distances]:
    """Compare models with a reference, window by window, at every token that has one after it.

    Raises:
        VerificationError: a logit isn't a finite number.
    """
    found: dict[str, list[Distances]] = {name: [] for name in others}
    for token_ids in windows.token_ids:
        expected = _finite(reference(token_ids), "the reference")
        for name, other in others.items():
            found[name] += _compare(expected, _finite(other(token_ids), name), token_ids)
        progress(len(token_ids))
    return {name: _joined(parts) for name, parts in found.items()}


def _finite(logits: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if not np.isfinite(logits).all():
        raise VerificationError(f"{int((~np.isfinite(logits)).sum())} logits of {name} are not finite numbers")
    return logits


def _compare(
    expected: NDArray[np.float32], found: NDArray[np.float32], token_ids: Sequence[int]
) -> Iterator[Distances]:
    targets = np.asarray(token_ids[1:])
    for start in range(0, len(targets), ROWS_AT_ONCE):
        wanted = targets[start : start + ROWS_AT_ONCE]
        rows = slice(start, start + len(wanted))
        p, q, each = log_probabilities(expected[rows]), log_probabilities(found[rows]), np.arange(len(wanted))
        yield Distances(
            divergence=(np.exp(p) * (p - q)).sum(axis=1),
            agrees=expected[rows].argmax(axis=1) == found[rows].argmax(axis=1),
            largest=np.abs(expected[rows] - found[rows]).max(axis=1),
            reference_losses=-p[each, wanted],
            losses=-q[each, wanted],
        )


def _joined(parts: Sequence[Distances]) -> Distances:
    return Distances(
        divergence=np.concatenate([part.divergence for part in parts]),
        agrees=np.concatenate([part.agrees for part in parts]),
        largest=np.concatenate([part.largest for part in parts]),
        reference_losses=np.concatenate([part.reference_losses for part in parts]),
        losses=np.concatenate([part.losses for part in parts]),
    )
