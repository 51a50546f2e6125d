"""What a model's logits say of the tokens that come."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.sampling import finite
from engram_runtime.session import Session


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the ``[T, V]`` logarithms of the probabilities that logits ``[T, V]`` stand for."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``[T]`` losses of targets ``[T]`` under ``[T, V]`` logits, in nats; raises what `finite` does."""
    losses: NDArray[np.float64] = -log_probabilities(finite(logits))[np.arange(len(targets)), targets]
    return losses


def next_token_losses(session: Session, token_ids: Sequence[int]) -> NDArray[np.float64]:
    """Return ``[T - 1]`` losses of all of ``[T]`` tokens but the first, as a new sequence.

    They are computed chunk by chunk: logits of a whole window may be gigabytes.
    """
    session.trim(len(session))
    ids = np.asarray(token_ids, dtype=np.int64)
    losses, scored = [], 0
    for logits in session.logits(token_ids):
        targets = ids[scored + 1 : scored + 1 + len(logits)]
        losses.append(negative_log_likelihood(logits[: len(targets)], targets))
        scored += len(logits)
    return np.concatenate(losses)
