"""What serves requests: the protocol, which the server and batches are written against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engram_runtime.errors import EngramError
from engram_runtime.serving.events import Event
from engram_runtime.serving.request import TextRequest
from engram_runtime.tokenizer import TextTokenizer

Tell = Callable[[int, Event], None]
"""Called by the engine's thread with the place of a text among those of its job, and what happened to it."""


class BusyError(EngramError):
    """The queue is full; ``retry_after_s`` is how long it may take until it isn't."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(EngramError):
    """A defect has ended the engine, which generates nothing any more."""


class UnavailableError(EngramError):
    """The engine's process is being started anew; ``retry_after_s`` is how long that may take."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerError(EngramError):
    """The process that generated a text has died, and the text with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What an engine has to do at this moment.

    Attributes:
        waiting: texts in the queue.
        running: texts in slots.
        slots: how many texts can run at once.
        cached_tokens: held by slots, for requests that begin alike.
    """

    waiting: int
    running: int
    slots: int
    cached_tokens: int


OK, DEGRADED, RESTARTING, FAILED = STATUSES = ("ok", "degraded", "restarting", "failed")  # from best to worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How an engine does.

    Attributes:
        status: ``ok``; ``degraded`` once rows of a table couldn't be had, which texts that need others survive;
            ``restarting`` while there is no process that generates; ``failed`` for good, see `Engine.failure`.
        since: seconds since 1970; None for ``ok``.
        reason: words; None for ``ok``.
        restarts: how often its process was started anew.
    """

    status: str = OK
    since: float | None = None
    reason: str | None = None
    restarts: int = 0


class Ticket(Protocol):
    """A job that was submitted."""

    def cancel(self) -> None:
        """Have its texts end within one forward pass, without a further event; from any thread, as often as one likes.

        Nothing happens to texts that have ended, nor to other jobs.
        """
        ...


class Engine(Protocol):
    """A bundle that generates for several at once; usable from any thread."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def context_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Says what generates: the bundle and the executor; 12 hexadecimal digits."""
        ...

    @property
    def failure(self) -> EngramError | None:
        """Why it generates nothing any more; None as long as it does."""
        ...

    @property
    def health(self) -> Health: ...

    @property
    def load(self) -> Load: ...

    def submit(self, requests: Sequence[TextRequest], tell: Tell, *, client: str = "") -> Ticket:
        """Queue the texts of a job; each ends with `Finished` or `Failed`, unless it is cancelled.

        Args:
            client: who asks: turns are taken between clients.

        Raises:
            BusyError: the queue is full, or the engine is being closed.
            RequestError: a request can't be served, such as a prompt beyond the context or a grammar with an error.
            EngineError: see `failure`.
            UnavailableError, WorkerError: its process is being started anew, or died while it read the request.
        """
        ...
