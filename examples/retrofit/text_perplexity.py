"""Perplexity on passages of text: what a table costs where it has nothing to say, and what it gives where it has."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_runtime.evaluation.losses import negative_log_likelihood
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer
from examples.retrofit.corpora import DEBIAN_REFERENCE, DEVILS_DICTIONARY, Package, fetch, text_of_deb
from examples.retrofit.intervals import perplexity_ratio
from examples.retrofit.recall import Question

SEED = 0
PASSAGE_TOKENS = 256
CHARACTERS_PER_TOKEN = 8  # more than any text has on average
MIN_PARAGRAPH = 200  # characters; headings and rules are no beginning

# Not one of them may be used in training, be it to keep a site quiet.
FOREIGN: dict[str, tuple[Package, str]] = {
    "The Devil's Dictionary": (DEVILS_DICTIONARY, "usr/share/dictd/devil.dict.dz"),
    "Debian Reference": (DEBIAN_REFERENCE, "usr/share/debian-reference/debian-reference.en.txt.gz"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """Token ids, and the first one whose loss counts."""

    token_ids: tuple[int, ...]
    scored_from: int


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """``sums [P]`` of the losses of each passage, in nats, its ``tokens [P]``, and what the site did to each token.

    ``added [N]``: at the tokens that were scored, the norm of what the site adds over that of the residual stream.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]
    added: NDArray[np.float32]

    @property
    def perplexity(self) -> float:
        """Of all tokens."""
        return float(np.exp(self.sums.sum() / self.tokens.sum()))

    def against(self, off: "Losses") -> dict[str, float | int]:
        """Return what the report holds; ``off`` are the same passages without rows."""
        ratio, low, high = perplexity_ratio(self.sums, off.sums, self.tokens)
        figures: dict[str, float | int] = {"perplexity": self.perplexity, "off": off.perplexity}
        added = {f"added_p{share}": float(np.percentile(self.added, share)) for share in (50, 95)}
        return {**figures, "ratio": ratio, "low": low, "high": high, "tokens": int(self.tokens.sum()), **added}


def foreign_text(name: str, folder: Path) -> str:
    """Return a corpus of `FOREIGN`, fetched into ``folder`` if it isn't there."""
    package, path = FOREIGN[name]
    return text_of_deb(fetch(package, folder), path)


def passages(tokenizer: TextTokenizer, text: str, *, tokens: int) -> list[Passage]:
    """Draw passages with a fixed seed, each from the beginning of a paragraph, until there are so many tokens."""
    paragraphs = text.split("\n\n")
    starts = np.cumsum([0, *(len(paragraph) + 2 for paragraph in paragraphs[:-1])])
    long = [int(start) for start, paragraph in zip(starts, paragraphs, strict=True) if len(paragraph) >= MIN_PARAGRAPH]
    chosen = random.Random(SEED).sample(long, min(len(long), -(-tokens // PASSAGE_TOKENS)))
    texts = (text[start : start + PASSAGE_TOKENS * CHARACTERS_PER_TOKEN] for start in sorted(chosen))
    return [Passage(tuple(tokenizer.encode(each, add_special_tokens=False)[:PASSAGE_TOKENS]), 1) for each in texts]


def statement_passage(question: Question) -> Passage:
    """Return a question with its answer, of which the statement and the end of the turn are scored."""
    token_ids = question.prompt_ids + question.answer_ids
    return Passage(token_ids, len(question.prompt_ids) + question.stated_from)


def losses(session: Session, texts: Sequence[Passage]) -> Losses:
    """Score each passage as a sequence of its own; the site is the bundle's only one."""
    sums, added = [], []
    for passage in texts:
        session.trim(len(session))
        logits, contributions = [], []
        for chunk in session.logits(passage.token_ids[:-1]):
            (activity,) = session.activity.values()
            logits.append(chunk)
            contributions.append(activity.contribution)
        targets = np.asarray(passage.token_ids[passage.scored_from :])
        scored = np.concatenate(logits)[passage.scored_from - 1 :]
        sums.append(float(negative_log_likelihood(scored, targets).sum()))
        added.append(np.concatenate(contributions)[passage.scored_from - 1 :])
    tokens = np.array([len(each.token_ids) - each.scored_from for each in texts])
    return Losses(np.array(sums), tokens, np.concatenate(added))
