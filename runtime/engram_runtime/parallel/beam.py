"""Beam search: the likeliest continuations of a prompt, several of which are followed at once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError
from engram_runtime.parallel.group import MOST_SEQUENCES, Group, require_memory
from engram_runtime.sampling import finite
from engram_runtime.session import Session

MAX_LENGTH_PENALTY = 10.0  # far further out, lengths to its power are no float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """A continuation; ``logprob`` is the sum of the natural logarithms of its tokens' probabilities."""

    token_ids: tuple[int, ...]
    logprob: float

    def score(self, length_penalty: float) -> float:
        """Return the sum over the number of tokens to the power of the penalty."""
        return float(self.logprob / len(self.token_ids) ** length_penalty)


def beam_search(
    session: Session,
    logits: NDArray[np.float32],
    *,
    width: int,
    max_tokens: int,
    end_ids: Collection[int],
    length_penalty: float = 1.0,
) -> list[Beam]:
    """Return the best continuations that were found, at most ``width``, the one with the highest score first.

    At each step the ``width`` likeliest continuations without an end token are followed; those with one that are
    likelier than the last of them are finished. The search is over when ``width`` are finished and no other can reach a
    higher score, after ``max_tokens``, or at the end of the context; what is followed then counts like what is
    finished. Of equally likely ones the earlier parent ranks first, then the lower token id.

    The session keeps its tokens and is not to be used meanwhile.

    Args:
        logits: ``[V]`` after the session's last token.
        length_penalty: 0 to 10; 0 compares sums, 1 means per token.

    Raises:
        RequestError: a width, a number of tokens or a penalty out of range, or more of them than memory is free for.
        NumericError: a logit is not finite.
    """
    _check(width, max_tokens, length_penalty)
    require_memory(session, width, max_tokens)
    finished: list[Beam] = []
    followed = [Beam(token_ids=(), logprob=0.0)]
    rows = logits[None]
    with Group(session, 1) as group:
        for length in range(1, max_tokens + 1):
            likely = _extended(followed, finite(rows), width * (1 + len(end_ids)))
            followed, parents = _divide(likely, finished, width, end_ids)
            finished = _best(finished, width, length_penalty)
            reachable = followed[0].logprob / max_tokens**length_penalty  # sums only fall
            decided = len(finished) == width and finished[-1].score(length_penalty) >= reachable
            if decided or length == max_tokens or group.room == 0:
                break
            group.keep(parents)
            rows = group.step([beam.token_ids[-1] for beam in followed])
    return _best([*finished, *followed], width, length_penalty)


def _extended(beams: Sequence[Beam], logits: NDArray[np.float32], count: int) -> list[tuple[Beam, int]]:
    """Return the likeliest beams with a token more, by ``logits [B, V]`` after each, and their parents."""
    totals = np.array([[beam.logprob] for beam in beams]) + log_softmax(logits)
    flat = totals.reshape(-1)
    count = min(count, flat.size)
    likely = np.flatnonzero(flat >= np.partition(flat, -count)[-count])
    ranked = likely[np.argsort(-flat[likely], kind="stable")][:count]
    parents, token_ids = (each.tolist() for each in np.divmod(ranked, totals.shape[1]))
    return [
        (Beam(token_ids=(*beams[parent].token_ids, token_id), logprob=logprob), parent)
        for logprob, parent, token_id in zip(flat[ranked].tolist(), parents, token_ids, strict=True)
    ]


def _divide(
    likely: Sequence[tuple[Beam, int]], finished: list[Beam], width: int, end_ids: Collection[int]
) -> tuple[list[Beam], list[int]]:
    """Return the first ``width`` beams that go on and their parents; add those that end before to ``finished``."""
    followed: list[Beam] = []
    parents: list[int] = []
    for beam, parent in likely:
        if len(followed) == width:
            break
        if beam.token_ids[-1] in end_ids:
            finished.append(beam)
        else:
            followed.append(beam)
            parents.append(parent)
    return followed, parents


def _best(beams: Sequence[Beam], width: int, length_penalty: float) -> list[Beam]:
    return sorted(beams, key=lambda beam: -beam.score(length_penalty))[:width]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the natural logarithms of the probabilities of ``logits [B, V]``."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _check(width: int, max_tokens: int, length_penalty: float) -> None:
    if not 1 <= width <= MOST_SEQUENCES:
        raise RequestError(f"beam width is {width}, expected 1 to {MOST_SEQUENCES}")
    if max_tokens < 1:
        raise RequestError(f"max_tokens is {max_tokens}, expected at least 1")
    if not 0 <= length_penalty <= MAX_LENGTH_PENALTY:
        raise RequestError(f"length_penalty is {length_penalty}, expected 0 to {MAX_LENGTH_PENALTY:g}")
