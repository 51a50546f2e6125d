"""A text scored in windows: perplexity and bits per byte."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError
from engram_runtime.evaluation.intervals import Estimate, ratio_of_sums
from engram_runtime.evaluation.losses import next_token_losses
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer

# Losses of neighbouring tokens depend on one another, which those of blocks do less. Of stretches of 2,000 tokens of a
# long text the interval holds the whole one's mean loss in 84 of 100, taking tokens as independent in 48
# (benchmarks/interval_coverage.py).
BLOCK_TOKENS = 128
Progress = Callable[[int], None]  # told how many tokens were scored


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """A text in windows, each a sequence of its own, of which all tokens but the first are scored, N together.

    Attributes:
        size: most tokens of a window.
        token_ids: of each window, two or more.
        num_bytes: ``[N]``, how many bytes of the text each scored token adds.
    """

    size: int
    token_ids: Sequence[Sequence[int]]
    num_bytes: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """How many tokens the windows hold."""
        return sum(map(len, self.token_ids))

    @classmethod
    def of(cls, tokenizer: TextTokenizer, text: str, *, tokens: int, window: int) -> "Windows":
        """Cut the first ``tokens`` of a text into windows; raises RequestError where nothing is left to score."""
        token_ids, num_bytes = tokenizer.encode_with_bytes(text)
        token_ids, num_bytes = token_ids[:tokens], num_bytes[:tokens]
        starts = range(0, len(token_ids) - 1, window)  # a last token alone would have nothing to score
        scored = [num_bytes[start + 1 : start + window] for start in starts]
        if sum(int(counts.sum()) for counts in scored) == 0:
            raise RequestError(
                f"a text of {len(token_ids)} tokens in windows of {window} has nothing to score, as the first one of "
                "each only stands before; give a longer one"
            )
        return cls(
            size=window,
            token_ids=[token_ids[start : start + window] for start in starts],
            num_bytes=np.concatenate(scored),
        )


def text_losses(session: Session, windows: Windows, progress: Progress = lambda count: None) -> NDArray[np.float64]:
    """Return ``[N]`` losses of a text's scored tokens, in nats."""
    losses = []
    for token_ids in windows.token_ids:
        losses.append(next_token_losses(session, token_ids))
        progress(len(token_ids))
    return np.concatenate(losses)


def block_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of ``[N]`` values over blocks of at least `BLOCK_TOKENS`, or over all where there are fewer."""
    starts = np.arange(max(1, len(values) // BLOCK_TOKENS)) * BLOCK_TOKENS
    sums: NDArray[np.float64] = np.add.reduceat(values, starts)
    return sums


def mean_of_tokens(values: NDArray[np.float64]) -> Estimate:
    """Return the mean of ``[N]`` values of a text's tokens; blocks of them are the units of the interval."""
    return ratio_of_sums(block_sums(values), block_sums(np.ones(len(values))))


def perplexity(losses: NDArray[np.float64]) -> Estimate:
    """Return exp of the mean of ``[N]`` losses."""
    return mean_of_tokens(losses).exp()


def perplexity_ratio(losses: NDArray[np.float64], others: NDArray[np.float64]) -> Estimate:
    """Return how many times that of ``others [N]`` the perplexity of ``losses [N]``, of the same tokens, is."""
    return mean_of_tokens(losses - others).exp()


def bits_per_byte(losses: NDArray[np.float64], windows: Windows) -> Estimate:
    """Return the bits that a byte of the text takes: unlike perplexity, comparable between vocabularies."""
    return ratio_of_sums(block_sums(losses / math.log(2)), block_sums(windows.num_bytes.astype(np.float64)))
