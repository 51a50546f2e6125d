"""Choose the next token from logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import NumericError, RequestError

Sampler = Callable[[NDArray[np.float32], Sequence[int]], int]
"""Takes logits ``[V]`` and the token ids so far, prompt included; returns the next token id."""

MAX_TEMPERATURE = 100.0  # at 100 the draw is all but uniform
MIN_PENALTY, MAX_PENALTY = 0.01, 100.0  # further out, penalised logits only leave the range of the others
NUCLEUS_GUESSES = (256, 4096)  # how many tokens to sort for top_p before sorting all; most steps need < 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to draw a token; the defaults choose the likeliest one.

    Args:
        temperature: 0 for the likeliest token, else the divisor of the logits.
        top_k: number of likeliest tokens kept, ties with the last included; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities add up to this.
        min_p: keep tokens at least this probable relative to the likeliest.
        repetition_penalty: divisor of positive, factor of negative logits of tokens that have occurred; 1 is none.
        seed: makes the draws repeatable; None takes entropy from the system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0 <= self.temperature <= MAX_TEMPERATURE, "between 0 and 100")
        _require("top_k", self.top_k, self.top_k >= 0, "0 for no limit or a positive number of tokens")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        in_range = MIN_PENALTY <= self.repetition_penalty <= MAX_PENALTY
        _require("repetition_penalty", self.repetition_penalty, in_range, "between 0.01 and 100")
        _require("seed", self.seed, self.seed is None or self.seed >= 0, "0 or a positive number")


def make_sampler(options: SamplingOptions) -> Sampler:
    """Compose penalty, temperature, top_k, top_p, min_p and draw, in this order.

    The sampler of a temperature above 0 owns a random generator: make one per sequence, use it from one thread.
    It raises NumericError if a logit is not finite.
    """
    rng = np.random.Generator(np.random.PCG64(options.seed))

    def sample_greedy(logits: NDArray[np.float32], token_ids: Sequence[int]) -> int:
        return int(np.argmax(_penalise(finite(logits), token_ids, options.repetition_penalty)))

    def sample_random(logits: NDArray[np.float32], token_ids: Sequence[int]) -> int:
        kept_ids, weights = distribution(finite(logits), token_ids, options)
        return draw(kept_ids, weights, rng)

    return sample_greedy if options.temperature == 0 else sample_random


def _require(name: str, value: float | None, valid: bool, wanted: str) -> None:
    if not valid:
        raise RequestError(f"{name} is {value}, wanted {wanted}")


def finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits; raises NumericError if one is not finite."""
    sound = np.isfinite(logits)
    if not sound.all():
        raise NumericError(
            f"the model produced {logits.size - np.count_nonzero(sound)} logits of {logits.size} that are nan or "
            "infinite, wanted finite numbers; check the bundle, or export it with a wider dtype"
        )
    return logits


def _penalise(logits: NDArray[np.float32], token_ids: Sequence[int], penalty: float) -> NDArray[np.floating]:
    if penalty == 1.0 or not token_ids:
        return logits
    ids = np.asarray(token_ids, dtype=np.int64)
    ids = ids[(ids >= 0) & (ids < logits.size)]  # a prompt may hold embeddings, and ids that are never written
    scores = logits.astype(np.float64)  # a large logit divided by a small penalty would overflow float32
    seen = scores[ids]
    scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)  # duplicates write the same value
    return scores


def distribution(
    logits: NDArray[np.float32], token_ids: Sequence[int], options: SamplingOptions
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the ids that can be drawn ``[K]``, ascending, and their weights ``[K]``, proportional to probability."""
    scores = _penalise(logits, token_ids, options.repetition_penalty)
    kept_ids = np.arange(scores.size)
    if 0 < options.top_k < scores.size:
        kept_ids = _top_k(scores, options.top_k)
        scores = scores[kept_ids]
    weights = _weights(scores, options.temperature)
    if options.top_p < 1:
        nucleus = _top_p(weights, options.top_p)
        kept_ids, weights = kept_ids[nucleus], weights[nucleus]
    if options.min_p > 0:
        likely = weights >= options.min_p  # the largest weight is 1
        kept_ids, weights = kept_ids[likely], weights[likely]
    return kept_ids, weights


def _top_k(scores: NDArray[np.floating], top_k: int) -> NDArray[np.int64]:
    threshold = np.partition(scores, -top_k)[-top_k]
    return np.flatnonzero(scores >= threshold)


def _weights(scores: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Return probabilities ``[K]`` relative to that of the likeliest token, which is 1."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is weight 0
        return np.asarray(np.exp(np.subtract(scores, scores.max(), dtype=np.float64) / temperature))


def _top_p(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Return the positions, ascending, of the fewest weights ``[K]`` that hold the share top_p; ties keep the first.

    Sorts only as many as needed: the vocabulary is large and the mass usually sits in a few tokens.
    """
    wanted = top_p * weights.sum()
    for size in *(guess for guess in NUCLEUS_GUESSES if guess < weights.size), weights.size:
        threshold = np.partition(weights, -size)[-size]
        top = np.flatnonzero(weights >= threshold)
        top = top[np.argsort(-weights[top], kind="stable")]
        mass = np.cumsum(weights[top])
        if mass[-1] >= wanted:
            break
    count = np.count_nonzero(mass < wanted) + 1  # one past the end if rounding leaves all of it below: keeps all
    return np.sort(top[:count])


def draw(kept_ids: NDArray[np.int64], weights: NDArray[np.float64], rng: np.random.Generator) -> int:
    """Draw one of ``kept_ids [K]`` by its weight ``[K]``."""
    mass = np.cumsum(weights)
    position = np.searchsorted(mass, rng.random() * mass[-1], side="right")  # in range: random() is below 1
    return int(kept_ids[position])
