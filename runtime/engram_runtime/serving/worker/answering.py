"""The worker's side: takes jobs for an engine and tells of their texts."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from engram_runtime.errors import EngramError
from engram_runtime.serving.engine_protocol import BusyError, Engine, EngineError, Health, Load, Ticket
from engram_runtime.serving.events import Event, Failed, Finished, Token
from engram_runtime.serving.figures import StepFigures
from engram_runtime.serving.worker.frames import FrameReader, FrameWriter, ProtocolError
from engram_runtime.serving.worker.messages import (
    Accepted,
    Beat,
    Cancel,
    Ended,
    ErrorNote,
    FromWorker,
    Lost,
    Opened,
    Refused,
    Said,
    State,
    Submit,
    decode_to_worker,
    encode_from_worker,
)

TICK_S = 0.25  # how old the server's knowledge of the engine's load may be
BEAT_S = 1.0  # how often it hears that the worker lives
MOST_UNSENT_BYTES = 16 << 20  # to a server that doesn't read; then texts fail
MOST_PASSES = 1000  # kept until the next state, which is a quarter of a second away at most
MOST_GRAMMARS = 4  # read at once, in threads of their own: one may take seconds


@dataclass(eq=False, slots=True)
class _Job:
    """A job of the server's; ``going`` are the places of texts that haven't ended."""

    number: int
    going: set[int]
    cancelled: bool = False
    ticket: Ticket | None = field(default=None)


class Answering:
    """Answers one server for one engine."""

    def __init__(self, engine: Engine, writer: FrameWriter) -> None:
        self._engine = engine
        self._writer = writer
        self._jobs: dict[int, _Job] = {}
        self._lock = threading.Lock()  # states are sent in the order they are taken in
        self._passes: deque[StepFigures] = deque(maxlen=MOST_PASSES)
        self._sent: tuple[Load, Health] | None = None
        self._sent_at = 0.0
        self._grammars = threading.Semaphore(MOST_GRAMMARS)

    def serve(self, reader: FrameReader) -> None:
        """Answer until the server leaves or the engine fails.

        Raises:
            ProtocolError: the server sent what it never should.
        """
        self._say(lambda state: Opened(fingerprint=self._engine.fingerprint, state=state))
        while self._engine.failure is None:
            try:
                frames = reader.receive(TICK_S)
            except EOFError:
                return
            for frame in frames:
                self._take(frame)
            self._beat()

    def watch(self, figures: StepFigures) -> None:
        """Take note of a forward pass; see `engram_runtime.serving.options.EngineOptions`.

        The server hears of it with the next state: to be woken for each one costs a text of a small model 3 %.
        """
        self._passes.append(figures)

    def _take(self, frame: bytes) -> None:
        match decode_to_worker(frame):
            case Submit() as message:
                self._begin(message)
            case Cancel() as message:
                self._cancel(message.job)
            case other:
                raise ProtocolError(f"a message is {other.kind!r}, wanted a job or its end")

    def _begin(self, message: Submit) -> None:
        job = self._jobs[message.job] = _Job(message.job, set(range(len(message.requests))))
        if not any(each.grammar is not None for each in message.requests):
            self._submit(job, message)
        elif self._grammars.acquire(blocking=False):
            threading.Thread(target=self._submit_with_grammar, args=(job, message), daemon=True).start()
        else:
            self._refuse(job, BusyError(f"{MOST_GRAMMARS} grammars are being made; ask again", BEAT_S))

    def _submit_with_grammar(self, job: _Job, message: Submit) -> None:
        try:
            self._submit(job, message)
        finally:
            self._grammars.release()

    def _submit(self, job: _Job, message: Submit) -> None:
        try:
            job.ticket = self._engine.submit(message.requests, partial(self._tell, job), client=message.client)
        except EngramError as error:
            self._refuse(job, error)
            return
        if job.cancelled:
            job.ticket.cancel()
        self._say(lambda state: Accepted(job=job.number, state=state))

    def _refuse(self, job: _Job, error: EngramError) -> None:
        self._jobs.pop(job.number, None)
        self._put(Refused(job=job.number, error=ErrorNote.of(error)))

    def _cancel(self, number: int) -> None:
        if (job := self._jobs.pop(number, None)) is not None:
            _leave(job)

    def _tell(self, job: _Job, index: int, event: Event) -> None:
        """Tell the server of an event; by the engine's thread."""
        if isinstance(event, Token):
            self._put(Said(job=job.number, index=index, token=event))
            if self._writer.unsent_bytes > MOST_UNSENT_BYTES:
                self._drop(job)
            return
        job.going.discard(index)
        if not job.going:
            self._jobs.pop(job.number, None)
        self._say(partial(_end, job.number, index, event))

    def _drop(self, job: _Job) -> None:
        """End a job whose texts aren't read."""
        _leave(job)
        self._jobs.pop(job.number, None)
        error = EngineError(f"more than {MOST_UNSENT_BYTES >> 20} MiB of texts weren't read; ask again")
        for index in sorted(job.going):
            self._say(partial(_end, job.number, index, Failed(error)))

    def _beat(self) -> None:
        now = (self._engine.load, self._engine.health)
        if self._passes or now != self._sent or time.monotonic() - self._sent_at >= BEAT_S:
            self._say(lambda state: Beat(state=state))

    def _say(self, make: Callable[[State], FromWorker]) -> None:
        """Send a message that has the engine's state."""
        with self._lock:
            passes = tuple(self._passes.popleft() for _ in range(len(self._passes)))
            self._sent, self._sent_at = (self._engine.load, self._engine.health), time.monotonic()
            self._put(make(State(load=self._sent[0], health=self._sent[1], passes=passes)))

    def _put(self, message: FromWorker) -> None:
        self._writer.put(encode_from_worker(message))


def _end(number: int, index: int, event: Finished | Failed, state: State) -> FromWorker:
    if isinstance(event, Failed):
        return Lost(job=number, index=index, error=ErrorNote.of(event.error), state=state)
    return Ended(job=number, index=index, end=event, state=state)


def _leave(job: _Job) -> None:
    """Cancel a job, be it before the engine has given a ticket: `Answering` then looks at ``cancelled``."""
    job.cancelled = True
    if job.ticket is not None:
        job.ticket.cancel()
