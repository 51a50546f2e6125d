"""Several samples of one prompt, drawn together, and the choice of one of them."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError, TableError
from engram_runtime.generation import GrowingText
from engram_runtime.parallel.drafts import SiblingDrafter, SiblingLookup
from engram_runtime.parallel.group import MOST_SEQUENCES, Group, require_memory
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
        RequestError: no sample, more than `MOST_SEQUENCES`, or several that would be the same.
    """
    if not 1 <= count <= MOST_SEQUENCES:
        raise RequestError(f"n is {count}, expected 1 to {MOST_SEQUENCES}")
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
    drafter: SiblingDrafter | None = None,
) -> Generator[Sample, None, None]:
    """Yield a sample for each of ``sampling`` as it finishes, of several at once the first one first.

    Each has the tokens of a generation that is alone. Rows that a forward pass has beyond one for each sample
    (`Group.spare`) verify drafts, unless the model has states that can't step back. The session keeps its tokens and is
    not to be used meanwhile, which ends when the generator is closed.

    Args:
        logits: ``[V]`` after the session's last token.
        sampling: see `seeded`.
        drafter: new, or None for `SiblingLookup`; it changes nothing but the time.

    Raises:
        RequestError: no memory is free for so many samples of so many tokens, or the drafter proposes what is no token.
        NumericError: a logit is not finite.
    """
    require_memory(session, len(sampling), max_tokens)
    drafter = drafter or SiblingLookup()
    prompt, context = list(session.token_ids), session.model.context_length
    drafter.add(prompt, len(prompt))
    going = [
        _Growing(index, options, prompt, GrowingText(tokenizer, stop, max_tokens), context)
        for index, options in enumerate(sampling)
    ]
    with Group(session, len(going)) as group, ThreadPoolExecutor(session.executor.threads) as threads:
        rows = [logits[None]] * len(going)
        drafts: list[list[int]] = [[] for _ in going]
        while going:
            said = list(threads.map(_Growing.draw, going, rows, drafts))
            group.trim([1 + len(drafted) - count for drafted, count in zip(drafts, said, strict=True)])
            for each, count in zip(going, said, strict=True):
                drafter.add(each.history, count)
            kept = [index for index, each in enumerate(going) if each.finish_reason is None]
            yield from (each.finished() for each in going if each.finish_reason is not None)
            group.keep(kept)
            going = [going[index] for index in kept]
            if going:
                drafts = drafter.drafts([each.history for each in going], [each.room for each in going], group.spare)
                drafts, rows = _verify(group, [each.history[-1] for each in going], drafts)


def _verify(
    group: Group, pending: Sequence[int], drafts: list[list[int]]
) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """Add a token and its drafts to each sequence; returns the drafts and logits ``[1 + k, V]`` of each.

    There are no drafts where rows of them can't be read, which may never be needed.
    """
    try:
        return drafts, group.extend([[token_id, *more] for token_id, more in zip(pending, drafts, strict=True)])
    except TableError:
        if not any(drafts):
            raise
    return [[] for _ in pending], group.extend([[token_id] for token_id in pending])


class _Growing:
    """A sample that is being drawn.

    Attributes:
        history: the prompt and all tokens so far.
        finish_reason: None as long as it goes on.
    """

    def __init__(
        self, index: int, options: SamplingOptions, prompt: Sequence[int], text: GrowingText, context: int
    ) -> None:
        assert options.seed is not None
        self._index = index
        self._seed = options.seed
        self._sample = make_sampler(options)
        self._text = text
        self._context = context
        self._logprob = 0.0
        self.history = list(prompt)
        self.finish_reason: str | None = None

    @property
    def room(self) -> int:
        """How many drafts can follow all tokens so far."""
        return min(self._text.room - 1, self._context - len(self.history))

    def draw(self, rows: NDArray[np.float32], drafts: Sequence[int]) -> int:
        """Add a token by each of ``rows [1 + k, V]`` until it isn't the draft there, or the last; return how many."""
        before = len(self.history)
        for logits, draft in zip(rows, [*drafts, None], strict=True):
            self._add(logits)
            if self.finish_reason is not None or self.history[-1] != draft:
                break
        return len(self.history) - before

    def _add(self, logits: NDArray[np.float32]) -> None:
        token_id = self._sample(logits, self.history)
        self._logprob += log_probability(logits, token_id)
        self.history.append(token_id)
        self._text.push(token_id)
        full = len(self.history) > self._context  # the last token is never held
        self.finish_reason = self._text.finish_reason or ("context" if full else None)

    def finished(self) -> Sample:
        """Return it as it is now, which is to be its end."""
        self._text.finish()
        assert self.finish_reason is not None
        return Sample(
            index=self._index,
            seed=self._seed,
            text=self._text.text,
            token_ids=tuple(self._text.token_ids),
            finish_reason=self._text.finish_reason or self.finish_reason,  # the rest may hold a stop string
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
