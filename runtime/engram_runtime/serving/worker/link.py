"""One life of a worker, as the server sees it: what goes to it and what comes from it."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from engram_runtime.errors import EngramError, RequestError
from engram_runtime.forking import check_process
from engram_runtime.serving.engine_protocol import BusyError, EngineError, Tell, UnavailableError, WorkerError
from engram_runtime.serving.events import Event, Failed
from engram_runtime.serving.figures import StepFigures
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.worker.frames import FrameReader, FrameWriter, ProtocolError
from engram_runtime.serving.worker.jobs import RemoteJob
from engram_runtime.serving.worker.messages import (
    Accepted,
    Beat,
    Cancel,
    Ended,
    FromWorker,
    Lost,
    Open,
    Opened,
    Refused,
    Said,
    State,
    Submit,
    decode_from_worker,
    encode_to_worker,
)
from engram_runtime.serving.worker.process import Worker
from engram_runtime.serving.worker.settings import WorkerSettings

TICK_S = 1.0  # how often it is looked whether the worker still answers
HUNG_S = 60.0  # without a message, of which there is one a second, before the worker is given up
ANSWER_S = 10.0  # for a worker to take a job, a grammar included
MOST_UNSENT_BYTES = 64 << 20  # to a worker that doesn't read
CLOSE_S = 1.0
DEFECT = "a defect has ended the engine: {!r}; start the server anew"


class Link:
    """A worker that opens a bundle and generates.

    Attributes:
        state: what it last said of itself; None before it has opened the bundle.
    """

    def __init__(self, worker: Worker, vocab_size: int, watch: Callable[[StepFigures], None]) -> None:
        """Use a worker that has been started.

        Args:
            watch: told of each forward pass, by the thread that is in `run`.
        """
        self.state: State | None = None
        self._process = os.getpid()
        self._worker = worker
        self._vocab_size = vocab_size
        self._watch = watch
        self._reader = FrameReader(worker.connection)
        self._writer = FrameWriter(worker.connection)
        self._lock = threading.Lock()
        self._jobs: dict[int, RemoteJob] = {}
        self._numbers = itertools.count(1)
        self._over = self._closing = False

    def open(self, settings: WorkerSettings) -> str:
        """Have the bundle opened, which may take minutes, and return the engine's fingerprint.

        Raises:
            EngramError: the worker says why it can't.
            WorkerError: it has died.
        """
        self._writer.put(encode_to_worker(Open(settings=settings)))
        try:
            while not (frames := self._reader.receive(TICK_S)):
                pass
            opened = _opened(decode_from_worker(frames[0]))
            self.state = opened.state
            for frame in frames[1:]:
                self._take(decode_from_worker(frame))
        except (EOFError, ProtocolError) as error:
            raise self._error(self._lost(error)) from error
        except EngramError:
            self._lost(EOFError())
            raise
        return opened.fingerprint

    def run(self) -> EngramError:
        """Take what the worker says until it dies, hangs or breaks the protocol; returns what is told of its texts.

        A defect of this process ends the worker too, so that no text waits for what nobody reads.
        """
        try:
            self._take_all()
        except (EOFError, ProtocolError) as error:
            jobs = self._end_jobs()
            reason = self._lost(error)
        except BaseException as defect:
            jobs = self._end_jobs()
            self._lost(EOFError())
            for job in jobs:
                job.lose(EngineError(DEFECT.format(defect)))
            raise
        for job in jobs:
            job.lose(self._error(reason))
        return self._error(reason)

    def submit(self, requests: Sequence[TextRequest], tell: Tell, client: str) -> "RemoteTicket":
        """See `engram_runtime.serving.engine_protocol.Engine.submit`."""
        if self._writer.unsent_bytes > MOST_UNSENT_BYTES:
            raise UnavailableError("the model's process takes no requests at the moment; ask again", ANSWER_S)
        job = RemoteJob(next(self._numbers), tuple(requests), tell, self._vocab_size)
        frame = encode_to_worker(Submit(job=job.number, client=client, requests=tuple(requests)))
        with self._lock:
            if self._over:
                raise UnavailableError("the model's process has died; it is started anew, ask again", CLOSE_S)
            self._jobs[job.number] = job
        self._writer.put(frame)
        if not job.answered.wait(ANSWER_S):
            self.cancel(job)
            raise _too_slow(requests)
        if job.refusal is not None:
            raise job.refusal
        return RemoteTicket(self, job)

    def cancel(self, job: RemoteJob) -> None:
        """See `engram_runtime.serving.engine_protocol.Ticket.cancel`."""
        check_process(self._process)
        job.cancelled = True
        with self._lock:
            known = self._jobs.pop(job.number, None)
        if known is not None:
            self._writer.put(encode_to_worker(Cancel(job=job.number)))

    def close(self) -> None:
        """Have `open` or `run` return, which end the worker; from any thread."""
        self._closing = True
        self._writer.close(0.0)

    def _take_all(self) -> NoReturn:
        heard = checked = time.monotonic()
        while True:
            frames = self._reader.receive(TICK_S)
            for frame in frames:
                self._take(decode_from_worker(frame))
            now = time.monotonic()
            heard = now if frames else heard
            if now - checked >= TICK_S:
                checked = now
                self._check_alive(now - heard)

    def _end_jobs(self) -> list[RemoteJob]:
        """Take no job from now on, and return those that there are."""
        with self._lock:
            self._over = True
            jobs, self._jobs = list(self._jobs.values()), {}
        return jobs

    def _lost(self, error: Exception) -> str:
        """Have the worker ended that was lost by an error, and return how it did."""
        self._writer.close(0.0)
        if isinstance(error, ProtocolError):
            self._worker.end(0.0)
            return f"was killed: {error}"
        return self._worker.end(CLOSE_S)

    def _error(self, reason: str) -> EngramError:
        """Return what a text that is lost is told, one error for each, as they are raised in several threads."""
        if self._closing:
            return BusyError("the engine was closed while the text was generated; ask again", CLOSE_S)
        return WorkerError(f"the process that generates {reason}; it is started anew, ask again")

    def _check_alive(self, silent_s: float) -> None:
        if silent_s > HUNG_S:
            raise ProtocolError(f"it has said nothing for {silent_s:.0f} s")
        with self._lock:
            overdue = any(job.overdue for job in self._jobs.values())
        if overdue:
            raise ProtocolError("a text hasn't ended by its time")

    def _take(self, message: FromWorker) -> None:
        if isinstance(message, Said):
            self._tell(message.job, message.index, message.token)
            return
        if isinstance(message, Refused):
            self._refuse(message.job, message.error.error())
            return
        self.state = message.state
        for figures in message.state.passes:
            self._watch(figures)
        match message:
            case Accepted():
                self._accept(message.job)
            case Ended():
                self._tell(message.job, message.index, message.end)
            case Lost():
                self._tell(message.job, message.index, Failed(message.error.error()))
            case Beat() | Opened():
                pass

    def _job(self, number: int) -> RemoteJob | None:
        """Return a job; None for one that was cancelled, of which the worker didn't know yet."""
        with self._lock:
            return self._jobs.get(number)

    def _accept(self, number: int) -> None:
        if (job := self._job(number)) is not None:
            job.answered.set()
            if job.ended:
                self._forget(job)

    def _tell(self, number: int, index: int, event: Event) -> None:
        if (job := self._job(number)) is None:
            return
        job.take(index, event)
        if job.ended and job.answered.is_set():
            self._forget(job)

    def _refuse(self, number: int | None, error: EngramError) -> None:
        if number is not None and (job := self._job(number)) is not None:
            self._forget(job)
            job.refuse(error)

    def _forget(self, job: RemoteJob) -> None:
        with self._lock:
            self._jobs.pop(job.number, None)


@dataclass(frozen=True, slots=True)
class RemoteTicket:
    """See `engram_runtime.serving.engine_protocol.Ticket`."""

    link: Link
    job: RemoteJob

    def cancel(self) -> None:
        self.link.cancel(self.job)


def _opened(answer: FromWorker) -> Opened:
    """Return the answer to `Open`; raises what it says where the bundle can't be opened, or ProtocolError."""
    if isinstance(answer, Refused):
        raise answer.error.error()
    if not isinstance(answer, Opened):
        raise ProtocolError(f"the first message is {answer.kind!r}")
    return answer


def _too_slow(requests: Sequence[TextRequest]) -> EngramError:
    if any(each.grammar is not None for each in requests):
        return RequestError(f"the grammar takes more than {ANSWER_S:.0f} s to make; simplify the schema")
    return UnavailableError("the model's process doesn't answer; ask again", ANSWER_S)
