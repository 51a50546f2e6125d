"""Several samples of one prompt, drawn together, and the choice of one of them."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError
from engram_runtime.parallel.group import Group, require_memory
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A finished continuation.

    Attributes:
        index: which of the samples it is, from 0.
        seed: with which a generation that is alone draws the same tokens.
        finish_reason: see `engram_runtime.generation.Generation`.
        logprob: sum over its tokens of the natural logarithms of their probabilities by the model, before
            temperature, penalty and limits.
    """

    index: int
    seed: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprob: float


Scorer = Callable[[Sample], float]
"""Tells how good a sample is; the highest wins."""


def seeded(options: SamplingOptions, count: int) -> list[SamplingOptions]:
    """Return the options of each sample: sample i draws with ``options.seed + i``, a random seed where there is none.

    Raises:
        RequestError: no sample, or several that would be the same.
    """
    if count < 1:
        raise RequestError(f"n is {count}, expected at least 1")
    if count > 1 and options.temperature == 0:
        raise RequestError(f"{count} samples at temperature 0 are all the same; set a temperature")
    # Of 32 bits, short enough to be typed again.
    first = int(np.random.SeedSequence().generate_state(1)[0]) if options.seed is None else options.seed
    return [replace(options, seed=first + index) for index in range(count)]


def draw_samples(
    session: Session,
    logits: NDArray[np.float32],
    tokenizer: TextTokenizer,
    sampling: Sequence[SamplingOptions],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
) -> Generator[Sample, None, None]:
    """Yield a sample for each of ``sampling`` as it finishes, of several at once the first one first.

    Each has the tokens of a generation that is alone. The session keeps its tokens and is not to be used meanwhile,
    which ends when the generator is closed.

    Args:
        logits: ``[V]`` after the session's last token.
        sampling: see `seeded`.

    Raises:
        RequestError: no memory is free for so many samples of so many tokens.
        VerificationError: a logit is not finite.
    """
    require_memory(session, len(sampling), max_tokens)
    going = [_Growing(index, options, tokenizer, stop) for index, options in enumerate(sampling)]
    with Group(session, len(going)) as group, ThreadPoolExecutor(session.executor.threads) as threads:
        rows = np.broadcast_to(logits, (len(going), len(logits)))
        while going:
            histories = [group.token_ids(index) for index in range(len(going))]
            list(threads.map(_Growing.draw, going, rows, histories))
            for each in going:
                each.finish(max_tokens, group.room)
            kept = [index for index, each in enumerate(going) if each.finish_reason is None]
            yield from (each.finished() for each in going if each.finish_reason is not None)
            if len(kept) < len(going):
                group.keep(kept)
                going = [going[index] for index in kept]
            if going:
                rows = group.step([each.token_ids[-1] for each in going])


class _Growing:
    """A sample that is being drawn."""

    def __init__(self, index: int, options: SamplingOptions, tokenizer: TextTokenizer, stop: Sequence[str]) -> None:
        assert options.seed is not None
        self._index = index
        self._seed = options.seed
        self._sample = make_sampler(options)
        self._end_ids = tokenizer.eos_token_ids
        self._text = tokenizer.stream(stop)
        self._pieces: list[str] = []
        self._logprob = 0.0
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def draw(self, logits: NDArray[np.float32], history: Sequence[int]) -> None:
        """Add a token by ``logits [V]`` after all tokens so far."""
        token_id = self._sample(logits, history)
        self.token_ids.append(token_id)
        self._logprob += log_probability(logits, token_id)

    def finish(self, max_tokens: int, room: int) -> None:
        """Add the last token's text and see whether it is the last one."""
        token_id = self.token_ids[-1]
        ended = token_id in self._end_ids
        self._pieces.append("" if ended else self._text.push(token_id))
        if self._text.stopped is not None:
            self.finish_reason = "stop_string"
        elif ended:
            self.finish_reason = "stop"
        elif len(self.token_ids) == max_tokens:
            self.finish_reason = "length"
        elif room == 0:
            self.finish_reason = "context"

    def finished(self) -> Sample:
        """Return it as it is now, which is to be its end."""
        assert self.finish_reason is not None
        return Sample(
            index=self._index,
            seed=self._seed,
            text="".join(self._pieces) + self._text.finish(),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprob=self._logprob,
        )


def log_probability(logits: NDArray[np.float32], token_id: int) -> float:
    """Return the natural logarithm of a token's probability by ``logits [V]``."""
    peak = logits.max()
    mass = np.exp(logits - peak).sum(dtype=np.float64)
    return float(logits[token_id] - peak) - math.log(mass)


def by_logprob(sample: Sample) -> float:
    """Score a sample by the sum of the log-probabilities of its tokens."""
    return sample.logprob


SCORERS: Mapping[str, Scorer] = {"logprob": by_logprob}


def best_of(samples: Iterable[Sample], score: Scorer = by_logprob) -> Sample:
    """Return the sample with the highest score, of equal ones the first."""
    return max(sorted(samples, key=lambda sample: sample.index), key=score)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What samples agree on.

    Attributes:
        answer: the most frequent one, of equal ones that of the first sample; None where no sample has one.
        counts: how many samples gave each answer.
        samples: those that had finished when the answer was certain, in that order.
    """

    answer: str | None
    counts: Mapping[str, int]
    samples: tuple[Sample, ...]


def vote(samples: Generator[Sample, None, None], count: int, extract: Callable[[str], str | None]) -> Vote:
    """Return the answer most samples give (self-consistency, arXiv 2203.11171), drawing no more than it takes.

    Args:
        samples: ``count`` of them as they finish, see `draw_samples`; closed once no other answer can have as
            many votes as the leading one.
        extract: finds the answer in a text, or None.
    """
    finished: list[Sample] = []
    votes: dict[int, str] = {}  # by sample
    with contextlib.closing(samples):
        for sample in samples:
            finished.append(sample)
            if (answer := extract(sample.text)) is not None:
                votes[sample.index] = answer
            if is_decided(Counter(votes.values()), count - len(finished)):
                break
    counts = Counter(votes[index] for index in sorted(votes))
    leading = counts.most_common(1)  # of equal counts the answer that came first
    return Vote(answer=leading[0][0] if leading else None, counts=dict(counts), samples=tuple(finished))


def is_decided(counts: Mapping[str, int], outstanding: int) -> bool:
    """Return whether ``outstanding`` more votes can bring no other answer level with the leading one."""
    leader, second, *_ = *sorted(counts.values(), reverse=True), 0, 0
    return leader - second > outstanding
