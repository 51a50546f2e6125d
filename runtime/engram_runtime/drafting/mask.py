"""Several tokens a pass by a model that was trained to guess at masks: arXiv 2602.06019.

A pass takes tokens and k - 1 masks after them. With L the logits after the last token and at each mask, y = argmax L
and c = max softmax L, all ``[k]``: y[0] is the model's next token, y[j] its guess of the one j places later. Said are

    y[0 .. m - 1], m = the first j with c[j] < tau, at least 1

Masks are seen causally, at the positions that the tokens will have, and nothing of them is kept.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import RequestError
from engram_runtime.generation import Tokens, say
from engram_runtime.sampling import Sampler, finite
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer

APPROXIMATE, VERIFIED = "mask (approximate)", "mask (verified)"  # as figures call them
MOST_TOKENS = 16  # k of the published models
DEFAULT_CONFIDENCE = 0.9
MASK_TOKENS = tuple(f"<|mtp_special_token_{index}|>" for index in range(32))  # theirs, of which the first is used


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOptions:
    """What stands for a token that isn't known, and how many of them a pass guesses at.

    Attributes:
        mask_id: a token that the model was trained to take for one it doesn't know.
        most: k, how many tokens a pass says at most; 1 uses no masks.
        confidence: tau, the least probability of a guess; 0 takes all.
    """

    mask_id: int
    most: int = 4
    confidence: float = DEFAULT_CONFIDENCE

    def __post_init__(self) -> None:
        if not 1 <= self.most <= MOST_TOKENS:
            raise RequestError(f"tokens a pass are {self.most}, expected 1 to {MOST_TOKENS}")
        if not 0 <= self.confidence <= 1:
            raise RequestError(f"confidence is {self.confidence}, expected 0 to 1")


def find_mask_id(tokenizer: TextTokenizer) -> int:
    """Return the token that published models have for a mask.

    Raises:
        RequestError: the tokenizer has none of them.
    """
    for token in MASK_TOKENS:
        if (token_id := tokenizer.token_id(token)) is not None:
            return token_id
    raise RequestError(
        f"the tokenizer has no {MASK_TOKENS[0]}, with which mask drafting marks unknown tokens; name the mask's id, or "
        f"choose another drafter"
    )


def decode_by_masks(
    session: Session,
    logits: NDArray[np.float32],
    sample: Sampler,
    options: MaskOptions,
    *,
    max_tokens: int,
    end_ids: Collection[int],
    statistics: DraftStatistics,
) -> Tokens:
    """Yield up to ``max_tokens`` ids as the paper does: guesses are said unverified, so text is not plain decoding's.

    A block of one token is sampled; longer ones are the likeliest tokens. Closing it leaves the session without the
    tokens of the last block.

    Args:
        logits: ``[V]`` after the session's last token.

    Raises:
        RequestError: as for `generation.say`.
    """
    masks = min(options.most - 1, session.room)
    rows = np.concatenate([logits[None], _run(session, [], masks, options.mask_id)])
    count = 0
    while True:
        block = confident(rows, options.confidence)
        if len(block) == 1:
            block = [sample(rows[0], session.token_ids)]
        statistics.note(masks, len(block))
        for place, token_id in enumerate(block):
            count += 1
            yield from say(session, token_id)
            if token_id in end_ids or count == max_tokens or session.room == place:
                return
        masks = min(options.most - 1, session.room - len(block))
        rows = _run(session, block, masks, options.mask_id)[len(block) - 1 :]


def decode_by_verified_masks(
    session: Session,
    logits: NDArray[np.float32],
    sample: Sampler,
    options: MaskOptions,
    *,
    max_tokens: int,
    end_ids: Collection[int],
    statistics: DraftStatistics,
) -> Tokens:
    """Yield up to ``max_tokens`` ids: those of `generation.decode_tokens`, whatever the masks say.

    A block's guesses are drafts of the next pass, which has masks after them; where one is wrong, what was guessed
    after it is of no use. While it is suspended the session may hold tokens that were not yielded yet; closing it trims
    them.

    Args:
        logits: ``[V]`` after the session's last token.

    Raises:
        RequestError: as for `generation.say`.
    """
    token_id = sample(logits, session.token_ids)
    yield from say(session, token_id)
    count, guesses = 1, list[int]()
    while token_id not in end_ids and count < max_tokens and session.room:
        drafts = guesses[: min(max_tokens - count, session.room) - 1]
        start, said, tokens = len(session), 0, [token_id, *drafts]
        masks = min(options.most - 1, session.room - len(tokens))
        rows = _run(session, tokens, masks, options.mask_id)
        changes = session.changes
        try:
            for row, draft in zip(rows, [*drafts, None], strict=False):  # the rows after these are of masks
                said += 1
                token_id = sample(row, session.token_ids[: start + said])
                yield from say(session, token_id)
                if token_id != draft or token_id in end_ids:
                    break
        finally:
            if session.changes == changes:
                session.trim(len(tokens) - said)
            statistics.note(len(drafts), said)
        count += said
        guesses = confident(rows[len(drafts) :], options.confidence)[1:] if said == len(tokens) else []


def confident(rows: NDArray[np.float32], confidence: float) -> list[int]:
    """Return the likeliest tokens of rows ``[k, V]`` up to the first that is less probable than that; one at least."""
    sure = np.logical_and.accumulate(_top_probabilities(finite(rows)) >= confidence)
    token_ids: list[int] = rows.argmax(axis=1)[: max(1, int(sure.sum()))].tolist()
    return token_ids


def _top_probabilities(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the softmax ``[k]`` of the largest of each row."""
    below = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    top: NDArray[np.float64] = 1 / np.exp(below).sum(axis=1)
    return top


def _run(session: Session, token_ids: Sequence[int], masks: int, mask_id: int) -> NDArray[np.float32]:
    """Add tokens; returns the logits after each of them and at so many masks after those, which are not kept."""
    start, count = len(session), len(token_ids) + masks
    if count == 0:
        return np.empty((0, session.model.vocab_size), dtype=np.float32)
    session.checkpoint()
    ids = [*token_ids, *[mask_id] * (_filled(session, count) - len(token_ids))]
    kept = 0  # nothing of a pass that is interrupted between its chunks
    try:
        rows = session.decode(ids)
        kept = len(token_ids)
    finally:
        session.trim(len(session) - start - kept)
    return rows[:count]


def _filled(session: Session, count: int) -> int:
    """Return how many tokens make one pass of at least ``count``: masks more than are asked for cost less than a pass.

    What stands after a token or a mask doesn't change it.
    """
    put_off, most = session.put_off, min(2 * count, session.room)
    wholes = (size for size in range(count, most + 1) if len(session.passes(put_off + size)) == 1)
    return next(wholes, count)
