"""An engine in another process, which is started anew whenever it dies."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from engram_runtime.bundle import Bundle
from engram_runtime.errors import EngramError
from engram_runtime.forking import check_process
from engram_runtime.serving.engine_protocol import (
    FAILED,
    RESTARTING,
    BusyError,
    EngineError,
    Health,
    Load,
    Tell,
    Ticket,
    UnavailableError,
)
from engram_runtime.serving.figures import StepFigures, unwatched
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.worker.link import DEFECT, Link
from engram_runtime.serving.worker.process import Worker
from engram_runtime.serving.worker.settings import WorkerSettings
from engram_runtime.tokenizer import TextTokenizer

LONGEST_PAUSE_S = 30.0  # between attempts to start a worker that doesn't get ready
START_S = 2.0  # that a start takes as long as none has been measured


class RemoteEngine:
    """An `Engine` whose bundle is open in a worker; close it, best by ``with``.

    While there is no worker, requests are refused by `UnavailableError`; texts that one died with fail by
    `WorkerError`.

    Attributes:
        failure: a worker that was started anew opened another bundle than before, so that nothing fits any more, or a
            defect has ended the thread that starts workers.
    """

    failure: EngramError | None = None

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: TextTokenizer,
        settings: WorkerSettings,
        start: Callable[[], Worker],
        watch: Callable[[StepFigures], None] = unwatched,
    ) -> None:
        """Have the first worker open the bundle.

        Args:
            start: starts a worker; called in a thread that lives as long as the engine.
            watch: told of each forward pass, by a thread of the engine's.

        Raises:
            EngramError: the bundle can't be opened; see `engram_runtime.serving.opening.open_engine`.
            WorkerError: the worker has died before it was open.
        """
        self.name = bundle.path.name.removesuffix(".engram")
        self.tokenizer = tokenizer
        self.context_length = bundle.manifest.model.context_length
        self.vocab_size = bundle.manifest.model.vocab_size
        self._process = os.getpid()
        self._settings = settings
        self._start = start
        self._watch = watch
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._down = Health()
        self._restarts = 0
        self._start_s = START_S
        self._link: Link | None = None  # to a worker that has opened the bundle
        self._latest: Link | None = None  # to the last one that was started
        first: Future[str] = Future()
        # All workers but the first are started in this thread, with whose end the system ends them.
        self._thread = threading.Thread(target=self._supervise, args=(first,), name=f"worker {self.name}", daemon=True)
        self._thread.start()
        self.fingerprint = first.result()

    @property
    def load(self) -> Load:
        """See `Engine.load`; a quarter of a second old at most."""
        link = self._link
        if link is None or link.state is None:
            return Load(waiting=0, running=0, slots=self._settings.slots, cached_tokens=0)
        return link.state.load

    @property
    def health(self) -> Health:
        """See `Health`."""
        link = self._link
        health = self._down if link is None or link.state is None else link.state.health
        return dataclasses.replace(health, restarts=self._restarts)

    def submit(self, requests: Sequence[TextRequest], tell: Tell, *, client: str = "") -> Ticket:
        """See `Engine.submit`."""
        check_process(self._process)
        if self.failure is not None:
            raise EngineError(str(self.failure))
        if self._closed.is_set():
            raise BusyError("the engine is being closed; ask again when it has been started anew", self._start_s)
        if (link := self._link) is None:
            raise UnavailableError(f"model {self.name!r} is being started anew; ask again", self._start_s)
        return link.submit(requests, tell, client)

    def close(self) -> None:
        """End the worker, and with it all texts, once however often it is called; nothing in a forked process."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed.set()
            latest = self._latest
        if latest is not None:
            latest.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _opened_link(self) -> tuple[Link, str]:
        """Start a worker and return the link to it, and the engine's fingerprint, once it has opened the bundle."""
        began = time.monotonic()
        link = Link(self._start(), self.vocab_size, self._watch)
        with self._lock:
            self._latest = link
            if self._closed.is_set():
                link.close()
        fingerprint = link.open(self._settings)
        self._start_s = time.monotonic() - began
        return link, fingerprint

    def _supervise(self, first: "Future[str]") -> None:
        """Have a worker all the time, until closed; ``first`` takes the fingerprint, or why there is none."""
        try:
            link, fingerprint = self._opened_link()
        except (EngramError, OSError) as error:
            first.set_exception(error)
            return
        except BaseException:  # a defect, which its traceback tells of
            first.cancel()
            raise
        self._link = link
        first.set_result(fingerprint)
        try:
            self._serve(link)
        except BaseException as defect:
            self._give_up(DEFECT.format(defect))
            raise

    def _serve(self, link: Link | None) -> None:
        while link is not None:
            loss = link.run()
            self._down = Health(status=RESTARTING, since=time.time(), reason=str(loss))
            self._link = None
            link = self._start_anew()
            self._link = link

    def _start_anew(self) -> Link | None:
        """Return the link to a new worker that has opened the bundle; None once closed, or where it is another one."""
        for pause_s in _pauses():
            if self._closed.wait(pause_s):
                break
            self._restarts += 1
            try:
                link, fingerprint = self._opened_link()
            except (EngramError, OSError) as error:
                self._down = dataclasses.replace(self._down, reason=str(error))
                continue
            if fingerprint == self.fingerprint:
                return link
            self._refuse(link)
            break
        return None

    def _refuse(self, link: Link) -> None:
        """Give up, as the bundle isn't the one whose tokenizer and name are known."""
        self._give_up(f"the bundle of model {self.name!r} was replaced; start the server anew")
        link.close()
        link.run()

    def _give_up(self, reason: str) -> None:
        self.failure = EngineError(reason)
        self._down = Health(status=FAILED, since=time.time(), reason=reason)
        self._link = None


def _pauses() -> Iterator[float]:
    """Yield the seconds before each attempt to start a worker: none, then twice as long each time."""
    yield 0.0
    pause_s = 1.0
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
