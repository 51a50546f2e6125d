"""The choice of a text's next token: what the request wants of logits, and what is told of each choice."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.sampling import make_sampler
from engram_runtime.serving.grammar import Guide
from engram_runtime.serving.request import TextRequest


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and its and the likeliest ones' log-probabilities where these are wanted; see `events.Token`."""

    token_id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Chooser:
    """A `Sampler` of one text, each call of which is a choice that stands.

    Logits are changed by bias and penalties and then by the grammar, before the repetition penalty, temperature and
    limits of the request's sampling.

    Attributes:
        choices: that nobody took yet.
    """

    def __init__(self, request: TextRequest, vocab_size: int, guide: Guide | None) -> None:
        self._sample = make_sampler(request.sampling)
        self._guide = guide
        self._top = request.top_logprobs
        self._penalties = request.frequency_penalty, request.presence_penalty
        self._counts: dict[int, int] = {}
        self._bias = request.logit_bias
        self._added: NDArray[np.float32] | None = None  # [V], to the logits
        if request.logit_bias or any(self._penalties):
            self._added = np.zeros(vocab_size, dtype=np.float32)
            self._added[list(request.logit_bias)] = list(request.logit_bias.values())
        self.choices: deque[Choice] = deque()

    @property
    def ended(self) -> bool:
        """Whether the grammar lets nothing come after the text so far."""
        return self._guide is not None and self._guide.ended

    def __call__(self, logits: NDArray[np.float32], token_ids: Sequence[int]) -> int:
        """Choose by ``logits [V]``; see `engram_runtime.sampling.Sampler`.

        Raises:
            RequestError: the grammar takes more work than is allowed.
            NumericError: a logit is not finite.
        """
        token_id = self._sample(self._changed(logits), token_ids)
        self.choices.append(self._choice(logits, token_id))
        if self._added is not None:
            self._count(self._added, token_id)
        if self._guide is not None:
            self._guide.push(token_id)
        return token_id

    def _changed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._added is not None:
            logits = logits + self._added
        if self._guide is not None:
            logits = logits.copy() if self._added is None else logits
            self._guide.restrict(logits)
        return logits

    def _count(self, added: NDArray[np.float32], token_id: int) -> None:
        count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
        frequency, presence = self._penalties
        added[token_id] = self._bias.get(token_id, 0.0) - count * frequency - presence

    def _choice(self, logits: NDArray[np.float32], token_id: int) -> Choice:
        if self._top is None:
            return Choice(token_id)
        peak = logits.max()
        log_mass = float(np.log(np.exp(logits - peak).sum(dtype=np.float64))) + float(peak)
        top = [(each, float(logits[each]) - log_mass) for each in _likeliest(logits, min(self._top, len(logits)))]
        return Choice(token_id, float(logits[token_id]) - log_mass, top)


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    """Return the ids of the largest of ``logits [V]``, the largest first, of equal ones the lower id."""
    if count == 0:
        return []
    least = np.partition(logits, -count)[-count]
    among = np.flatnonzero(logits >= least)
    ids: list[int] = among[np.argsort(-logits[among], kind="stable")][:count].tolist()
    return ids
