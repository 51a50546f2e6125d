"""Token by token generation over a session, and what it took."""

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import RequestError
from engram_runtime.sampling import Sampler
from engram_runtime.session import Session
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tokenizer import TextTokenizer

Tokens = Generator[int, None, None]  # ids one by one; closing it leaves the session with the tokens before the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished generation.

    Attributes:
        finish_reason: ``stop`` for an end token, ``stop_string``, ``length`` for max_tokens, or ``context``.
        prefilled_tokens: prompt tokens that were computed, be it again; the states held the others already.
        ttft_s: seconds from the request to the first token.
        decode_s: seconds from the first token to the last.
        tables: by site, what its table was asked for, see `Session.counters`; zeros with tables off.
        drafts: what they came to, None where none were made.
        experts: that the forward passes after the prompt's read, each layer's distinct ones pass by pass; None for a
            model without experts and where they aren't counted.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    prefilled_tokens: int
    prefill_s: float
    ttft_s: float
    decode_s: float
    tables: Mapping[str, TableCounters]
    drafts: DraftStatistics | None = None
    experts: int | None = None

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens computed per second."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first one."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s else 0.0

    @property
    def forwards(self) -> int:
        """Forward passes after the prompt's."""
        return len(self.token_ids) - 1 if self.drafts is None else self.drafts.forwards

    @property
    def experts_per_forward(self) -> float | None:
        """Distinct experts that a forward pass reads in all layers together; None as for `experts`, or without one."""
        return None if self.experts is None or not self.forwards else self.experts / self.forwards


class GrowingText:
    """The tokens of one generation as they come, their text, and whether they end it.

    Attributes:
        token_ids: so far.
        text: what is certain of it; all of it after `finish`.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], max_tokens: int) -> None:
        """Begin with no token; raises RequestError where there are none to come, or a stop string is out of range."""
        if max_tokens < 1:
            raise RequestError(f"max_tokens is {max_tokens}, expected at least 1")
        self._stream = tokenizer.stream(stop)
        self._end_ids = tokenizer.eos_token_ids
        self._max_tokens = max_tokens
        self.token_ids: list[int] = []
        self.text = ""

    @property
    def room(self) -> int:
        """How many more tokens may come."""
        return self._max_tokens - len(self.token_ids)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stream.stopped is not None

    @property
    def finish_reason(self) -> str | None:
        """See `Generation`; None where only the context can end it."""
        if self.stopped:
            return "stop_string"
        if self.token_ids and self.token_ids[-1] in self._end_ids:
            return "stop"
        return None if self.room else "length"

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is certain now; an end token has none."""
        self.token_ids.append(token_id)
        return self._grown("" if token_id in self._end_ids else self._stream.push(token_id))

    def finish(self) -> str:
        """Return the rest of the text."""
        return self._grown(self._stream.finish())

    def _grown(self, piece: str) -> str:
        self.text += piece
        return piece


def decode_tokens(
    session: Session, logits: NDArray[np.float32], sample: Sampler, *, max_tokens: int, end_ids: Collection[int]
) -> Tokens:
    """Yield up to ``max_tokens`` ids, the end token included if one comes.

    Args:
        logits: ``[V]`` after the session's last token.

    Raises:
        RequestError: as for `say`.
    """
    for count in range(1, max_tokens + 1):
        token_id = sample(logits, session.token_ids)
        yield from say(session, token_id)
        if token_id in end_ids or count == max_tokens or session.room == 0:
            return
        logits = session.decode([token_id])[-1]


def say(session: Session, token_id: int) -> Tokens:
    """Yield a token; a session that others used before the next one is asked for can't go on with this text.

    Raises:
        RequestError: they did.
    """
    changes = session.changes
    yield token_id
    if session.changes != changes:
        raise RequestError(
            "another text was begun in this session while this one was generated, which can't go on; finish or close "
            "a text before the next one"
        )
