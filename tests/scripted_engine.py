"""A serving engine without a model: every text says what its script has for it, token by token."""

import threading
from collections.abc import Callable, Sequence

from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import EngramError
from engram_runtime.generation import Generation, GrowingText
from engram_runtime.serving.engine_protocol import FAILED, BusyError, Health, Load, Tell
from engram_runtime.serving.events import Failed, Finished, SiteReading, Token
from engram_runtime.serving.request import TextRequest
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tokenizer import TextTokenizer

SITE = "layer_1"
ROWS = (3, 5)


class ScriptedEngine:
    """An engine whose jobs have a thread each.

    Attributes:
        name: by which requests call it.
        failure: what ended it, as far as anyone is told.
        requests: all that came.
        clients: who asked, job by job.
        go_on: texts wait for it before each token.
        error: that the next texts fail with.
        cancelled: how many texts were cancelled before their end.
        slots: how many texts may run; the next one is refused.
    """

    fingerprint = "scripted"
    vocab_size = 300

    def __init__(
        self, tokenizer: TextTokenizer, script: Callable[[TextRequest], str], *, context_length: int = 192
    ) -> None:
        self.name = "scripted"
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.failure: EngramError | None = None
        self.requests: list[TextRequest] = []
        self.clients: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: EngramError | None = None
        self.cancelled = 0
        self.slots = 4
        self._script = script
        self._running = 0
        self._lock = threading.Lock()

    @property
    def health(self) -> Health:
        return Health() if self.failure is None else Health(status=FAILED, since=0.0, reason=str(self.failure))

    @property
    def load(self) -> Load:
        return Load(waiting=0, running=self._running, slots=self.slots, cached_tokens=0)

    def submit(self, requests: Sequence[TextRequest], tell: Tell, *, client: str = "") -> "ScriptedTicket":
        with self._lock:
            if self._running + len(requests) > self.slots:
                raise BusyError(f"{self._running} texts are running, wanted at most {self.slots}; ask again", 2.4)
            self._running += len(requests)
        self.requests += requests
        self.clients.append(client)
        ticket = ScriptedTicket()
        threading.Thread(target=self._run, args=(requests, tell, ticket), daemon=True).start()
        return ticket

    def _run(self, requests: Sequence[TextRequest], tell: Tell, ticket: "ScriptedTicket") -> None:
        for index, request in enumerate(requests):
            if self.error is not None:
                tell(index, Failed(self.error))
            else:
                self._say(index, request, tell, ticket)
            with self._lock:
                self._running -= 1

    def _say(self, index: int, request: TextRequest, tell: Tell, ticket: "ScriptedTicket") -> None:
        text = GrowingText(self.tokenizer, request.stop, request.max_tokens)
        script = [*self.tokenizer.encode(self._script(request)), min(self.tokenizer.eos_token_ids)]
        for token_id in script:
            while not self.go_on.wait(0.01) and not ticket.left:
                pass
            if ticket.left:
                self.cancelled += 1
                return
            tell(index, _token(request, token_id, text.push(token_id)))
            if text.finish_reason is not None:
                break
        tell(index, Finished(piece=text.finish(), generation=_generation(request, text), queued_s=0.01))


class ScriptedTicket:
    """A job; ``left`` is whether it was cancelled."""

    left = False

    def cancel(self) -> None:
        self.left = True


def _token(request: TextRequest, token_id: int, piece: str) -> Token:
    asked = request.top_logprobs
    return Token(
        token_id=token_id,
        piece=piece,
        logprob=None if asked is None else -0.5,
        top=[(token_id, -0.5), (0, -20_000.0)][:asked] if asked else (),
        sites={SITE: SiteReading(ROWS, 0.25, float("inf"))} if request.activity else None,
    )


def _generation(request: TextRequest, text: GrowingText) -> Generation:
    return Generation(
        text=text.text,
        token_ids=tuple(text.token_ids),
        finish_reason=text.finish_reason or "context",
        prompt_tokens=len(request.prompt_ids),
        prefilled_tokens=1,
        prefill_s=0.1,
        ttft_s=0.1,
        decode_s=0.1,
        tables={SITE: TableCounters(rows=8, unique=6, bytes=96, cold=1, wait_s=0.002)},
        drafts=DraftStatistics(drafter="lookup", forwards=2, tokens=4, drafted=[2, 1], accepted=[1, 1]),
        experts=None,
    )
