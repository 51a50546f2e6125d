"""Jobs that a worker was given, as the server keeps them: what may be told of them, and by when."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from engram_runtime.errors import EngramError
from engram_runtime.serving.engine_protocol import Tell
from engram_runtime.serving.events import Event, Failed, Finished, Token
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.worker.frames import ProtocolError

GRACE_S = 30.0  # beyond a text's own time, after which an engine that hasn't ended it hangs
FINISH_REASONS = frozenset({"stop", "stop_string", "length", "context", "time"})


@dataclass(eq=False, slots=True)
class RemoteJob:
    """Texts that were submitted together.

    Attributes:
        number: by which both processes call it.
        answered: set once the worker took or refused it, or has died.
        refusal: why it wasn't taken.
        cancelled: set by any thread.
    """

    number: int
    requests: Sequence[TextRequest]
    tell: Tell
    vocab_size: int
    answered: threading.Event = field(default_factory=threading.Event)
    refusal: EngramError | None = None
    cancelled: bool = False
    _said: Counter[int] = field(default_factory=Counter)
    _going: set[int] = field(init=False)
    _deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self._going = set(range(len(self.requests)))
        self._deadline = time.monotonic() + max((each.time_limit_s for each in self.requests), default=0.0) + GRACE_S

    @property
    def ended(self) -> bool:
        """Whether all texts have."""
        return not self._going

    @property
    def overdue(self) -> bool:
        """Whether it should have ended long ago."""
        return time.monotonic() > self._deadline

    def take(self, index: int, event: Event) -> None:
        """Tell of an event, after a check that a sound engine could have told it; the worker isn't trusted.

        Raises:
            ProtocolError: of a text that isn't there, or has ended, or has as many tokens as it may.
        """
        if index not in self._going:
            raise ProtocolError(f"an event is of text {index}, which has ended or never was")
        if isinstance(event, Token):
            self._count(index, event)
        elif isinstance(event, Finished):
            self._check_end(event)
        if not isinstance(event, Token):
            self._going.remove(index)
        self._tell(index, event)

    def refuse(self, error: EngramError) -> None:
        """Have it not taken."""
        self.refusal = error
        self.answered.set()

    def lose(self, error: EngramError) -> None:
        """Have all texts that haven't ended fail, or the job be refused where it isn't taken yet."""
        if not self.answered.is_set():
            self.refuse(error)
            return
        for index in sorted(self._going):
            self._tell(index, Failed(error))
        self._going.clear()

    def _count(self, index: int, token: Token) -> None:
        self._said[index] += 1
        if self._said[index] > self.requests[index].max_tokens:
            raise ProtocolError(f"text {index} has more than the {self.requests[index].max_tokens} tokens it may")
        self._check_ids([token.token_id, *(token_id for token_id, _ in token.top)])

    def _check_end(self, end: Finished) -> None:
        if end.generation.finish_reason not in FINISH_REASONS:
            raise ProtocolError(f"a text has ended by {end.generation.finish_reason[:40]!r}, which is no reason")
        self._check_ids(end.generation.token_ids)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            raise ProtocolError(f"a token is outside the vocabulary of {self.vocab_size}")

    def _tell(self, index: int, event: Event) -> None:
        if not self.cancelled:
            self.tell(index, event)
