"""Perplexity of a bundle on a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError
from engram_runtime.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """``value`` is exp of the mean negative log-likelihood of ``tokens`` tokens; ``error`` its standard error."""

    value: float
    error: float
    tokens: int


def perplexity(
    session: Session, token_ids: Sequence[int], *, window: int, progress: Callable[[int], None] = lambda count: None
) -> Perplexity:
    """Score a text in windows of their own, each token but a window's first one.

    Args:
        progress: told the tokens of each window.
    """
    if len(token_ids) < 2 or window < 2:
        raise RequestError(f"a text of {len(token_ids)} tokens in windows of {window} has nothing to score")
    losses: list[NDArray[np.float64]] = []
    for start in range(0, len(token_ids) - 1, window):
        ids = np.asarray(token_ids[start : start + window])
        session.trim(len(session))
        losses += _window_losses(session, ids)
        progress(len(ids))
    each = np.concatenate(losses)
    value = float(np.exp(each.mean()))
    return Perplexity(value=value, error=value * float(each.std() / np.sqrt(len(each))), tokens=len(each))


def _window_losses(session: Session, ids: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Return the losses of ``ids[1:]``, chunk by chunk: logits of a whole window may be gigabytes."""
    losses, scored = [], 0
    for logits in session.logits(ids.tolist()):
        targets = ids[scored + 1 : scored + 1 + len(logits)]
        losses.append(negative_log_likelihood(logits[: len(targets)], targets))
        scored += len(logits)
    return losses


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``[T]`` losses of targets ``[T]`` under ``[T, V]`` logits."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(wide).sum(axis=1))
    losses: NDArray[np.float64] = normaliser - wide[np.arange(len(targets)), targets]
    return losses
