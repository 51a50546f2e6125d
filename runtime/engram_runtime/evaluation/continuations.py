"""How likely texts are after a prompt that they share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.evaluation.losses import log_probabilities
from engram_runtime.sequences import common_length
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids of a prompt, and of what may follow it."""

    token_ids: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @classmethod
    def of(cls, tokenizer: TextTokenizer, prompt: str, continuations: Sequence[str]) -> "Prompt":
        """Encode a prompt joined with each continuation, which isn't empty, as a model reads them.

        The prompt ends with the last token that is the same in all of them: a token may hold the prompt's end together
        with a continuation's beginning. Nothing may be left of it.
        """
        alone = tokenizer.encode(prompt)
        whole = [tokenizer.encode(prompt + continuation) for continuation in continuations]
        shared = min(min(common_length(alone, ids), len(ids) - 1) for ids in whole)
        return cls(token_ids=alone[:shared], continuations=[ids[shared:] for ids in whole])

    @property
    def longest(self) -> int:
        """How many tokens the prompt and its longest continuation have."""
        return len(self.token_ids) + max(map(len, self.continuations))

    def runs(self) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Yield what is read, each after the tokens before it."""
        yield (), self.token_ids
        yield from ((self.token_ids, token_ids) for token_ids in self.continuations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
        logprob: natural logarithm of its probability after the prompt.
        greedy: whether each of its tokens is the likeliest one.
    """

    logprob: float
    tokens: int
    greedy: bool


def likelihoods(session: Session, prompt: Prompt) -> list[Likelihood]:
    """Return how likely each continuation is; the prompt is computed once, as far as the session doesn't hold it."""
    held = common_length(session.token_ids, prompt.token_ids[:-1])
    session.trim(len(session) - held)
    after = session.prefill(prompt.token_ids[held:])[None]
    session.checkpoint()
    found = []
    for token_ids in prompt.continuations:
        logits = [after]
        if len(token_ids) > 1:
            logits += session.logits(token_ids[:-1])
        found.append(_likelihood(np.concatenate(logits), token_ids))
        session.trim(len(token_ids) - 1)
    return found


def _likelihood(logits: NDArray[np.float32], token_ids: Sequence[int]) -> Likelihood:
    each = log_probabilities(logits)[np.arange(len(token_ids)), token_ids]
    greedy = bool((logits.argmax(axis=1) == token_ids).all())
    return Likelihood(logprob=float(each.sum()), tokens=len(token_ids), greedy=greedy)
