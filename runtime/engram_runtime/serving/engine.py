"""The engine: a bundle that generates for several at once, on a thread of its own."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engram_runtime.bundle import Bundle, manifest_bytes
from engram_runtime.drafting.opening import Decoding
from engram_runtime.errors import EngramError
from engram_runtime.executor import Executor
from engram_runtime.forking import check_process
from engram_runtime.generation import GrowingText
from engram_runtime.parallel.group import require_memory
from engram_runtime.sequences import require_room, require_vocabulary
from engram_runtime.serving.choosing import Chooser
from engram_runtime.serving.engine_protocol import FAILED, BusyError, EngineError, Health, Load, Tell, Ticket
from engram_runtime.serving.grammar import Grammars
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.queue import FairQueue
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.running import RunningTexts
from engram_runtime.serving.text import Job, Text
from engram_runtime.serving.usage import Usage
from engram_runtime.session import Session
from engram_runtime.site import Site
from engram_runtime.tokenizer import TextTokenizer

UNKNOWN_S = 1.0  # what a text takes as long as none has ended


@dataclass(frozen=True, slots=True)
class _Ticket:
    """See `Ticket`."""

    engine: "BundleEngine"
    job: Job

    def cancel(self) -> None:
        self.engine.cancel(self.job)


class BundleEngine:
    """An `Engine` of a loaded bundle; close it, best by ``with``.

    A text has the tokens that `engram_runtime.llm.LLM` generates for the same prompt and seed, whatever runs beside it.
    On onnxruntime, where bits depend on how many tokens a pass has, the logits may differ in their last ones by how
    much of the prompt was known.
    """

    failure: EngramError | None = None
    _failed_at: float | None = None  # seconds since 1970

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor,
        sites: Sequence[Site],
        tokenizer: TextTokenizer,
        options: EngineOptions,
        *,
        decoding: Decoding | None = None,
        overlays: Sequence[str] = (),
    ) -> None:
        """Start an engine.

        Args:
            sites: the caller's, who closes them after it.
            overlays: SHA-256 of what lies over their tables.
            decoding: for a text that is the only one, in place of one token a pass; it mustn't change the text.

        Raises:
            RequestError: there is no memory for the states of so many texts.
        """
        self.name = bundle.path.name.removesuffix(".engram")
        self.tokenizer = tokenizer
        self.context_length = bundle.manifest.model.context_length
        self.vocab_size = bundle.manifest.model.vocab_size
        generates = manifest_bytes(bundle.manifest) + f"{executor.name} {options.tables_on} {[*overlays]}".encode()
        self.fingerprint = hashlib.sha256(generates).hexdigest()[:12]
        self._process = os.getpid()
        self._sites = sites
        self._options = options
        self._grammars = Grammars(bundle.path / "tokenizer.json", tokenizer.eos_token_ids)
        self._queue = FairQueue()
        self._changed = threading.Condition()  # the queue, or what follows
        self._draining = self._closed = False
        with contextlib.ExitStack() as opened:
            sessions = [
                opened.enter_context(Session(bundle, executor, sites, tables_on=options.tables_on))
                for _ in range(options.slots)
            ]
            require_memory(sessions[0], options.slots, self.context_length)
            self._running = RunningTexts(sessions, tokenizer.eos_token_ids, decoding, options.watch)
            opened.callback(self._running.close)
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._run, name=f"engram-engine {self.name}", daemon=True)
        self._thread.start()

    @property
    def health(self) -> Health:
        """See `Health`."""
        if self.failure is not None:
            return Health(status=FAILED, since=self._failed_at, reason=str(self.failure))
        return self._running.health

    @property
    def load(self) -> Load:
        """See `Engine.load`."""
        check_process(self._process)
        with self._changed:
            waiting = len(self._queue)
        slots = self._running.slots
        return Load(waiting=waiting, running=len(self._running), slots=len(slots), cached_tokens=slots.cached_tokens)

    def submit(self, requests: Sequence[TextRequest], tell: Tell, *, client: str = "") -> Ticket:
        """See `Engine.submit`; a grammar is read here, which takes a while where it is the first one or large."""
        check_process(self._process)
        job = Job(client, tell, time.perf_counter())
        with self._changed:
            self._check_open()  # before the work that grammars are
        texts = [self._text(job, index, request) for index, request in enumerate(requests)]
        with self._changed:
            self._check_open()
            for text in texts:
                self._queue.add(text)
            self._changed.notify_all()
        return _Ticket(self, job)

    def cancel(self, job: Job) -> None:
        """See `Ticket.cancel`."""
        check_process(self._process)
        job.cancelled = True
        with self._changed:
            self._queue.remove_job(job)
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Take no more jobs and wait until all texts have ended; returns whether they have by then."""
        check_process(self._process)
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._closed or not self._has_texts(), timeout_s)

    def close(self) -> None:
        """End texts and thread, once however often it is called; not to be called by what is told of a text.

        A forked process has neither, and does nothing.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _text(self, job: Job, index: int, request: TextRequest) -> Text:
        require_vocabulary(request.prompt_ids, self.vocab_size)
        require_vocabulary(list(request.logit_bias), self.vocab_size)
        require_room(len(request.prompt_ids), 0, self.context_length)
        growing = GrowingText(self.tokenizer, request.stop, request.max_tokens)
        guide = None if request.grammar is None else self._grammars.guide(request.grammar)
        chooser = Chooser(request, self.vocab_size, guide)
        return Text(job, index, request, growing, chooser, Usage(self._sites))

    def _check_open(self) -> None:
        if self.failure is not None:
            raise EngineError(str(self.failure))
        text_s = self._text_s()
        if self._closed or self._draining:
            raise BusyError("the engine is being closed; ask again when it has been started anew", text_s)
        if (jobs := self._queue.jobs) >= self._options.queue:
            raise BusyError(f"{jobs} requests are waiting, which is all that the queue holds; try again later", text_s)

    def _text_s(self) -> float:
        """Return the seconds after which a slot may be free."""
        took_s = list(self._running.took_s)
        return sum(took_s) / len(took_s) / self._options.slots if took_s else UNKNOWN_S

    def _run(self) -> None:
        error: EngramError = BusyError("the engine was closed while the text was generated; ask again", UNKNOWN_S)
        try:
            while self._admit():
                self._running.turn()
        except BaseException as defect:
            error = EngineError(f"a defect has ended the engine: {defect!r}; start it anew")
            self._failed_at = time.time()
            self.failure = error.with_traceback(None)
            raise
        finally:
            with self._changed:
                self._closed = True
                texts = [*self._running.texts, *self._queue]
                self._changed.notify_all()
            for text in texts:
                text.fail(error)

    def _admit(self) -> bool:
        """Wait for texts and give slots to those whose turn it is; returns whether to go on."""
        with self._changed:
            if not self._has_texts():
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._has_texts())
            if self._closed:
                return False
            now = time.perf_counter()
            late = [text for text in self._queue if now >= text.deadline]
            for text in late:
                self._queue.remove(text)
            while self._queue and self._running.slots.free:
                self._running.admit(self._queue.take())
        for text in late:
            text.admit()
            text.finish("time")
        return True

    def _has_texts(self) -> bool:
        return len(self._queue) > 0 or len(self._running) > 0
