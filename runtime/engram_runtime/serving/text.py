"""One text of a job: what was asked, how far it has come, and what it took."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import EngramError
from engram_runtime.generation import Generation, GrowingText
from engram_runtime.serving.choosing import Chooser
from engram_runtime.serving.engine_protocol import Tell
from engram_runtime.serving.events import Event, Failed, Finished, SiteReading, Token
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.usage import Usage


@dataclass(eq=False, slots=True)
class Job:
    """Texts that were submitted together; ``cancelled`` may be set by any thread."""

    client: str
    tell: Tell
    submitted: float
    cancelled: bool = False


class Text:
    """A text of a job, which is told of it as it grows; the engine's thread's alone."""

    def __init__(
        self, job: Job, index: int, request: TextRequest, growing: GrowingText, chooser: Chooser, usage: Usage
    ) -> None:
        self.job, self.request, self.chooser, self.usage = job, request, chooser, usage
        self._index = index
        self._growing = growing
        self._admitted = self._first = self._last = job.submitted

    @property
    def deadline(self) -> float:
        """The time, by `time.perf_counter`, at which it ends."""
        return self.job.submitted + self.request.time_limit_s

    @property
    def room(self) -> int:
        """How many more tokens may come, if the context holds them."""
        return self._growing.room

    @property
    def seconds(self) -> float:
        """How long it has been out of the queue."""
        return time.perf_counter() - self._admitted

    def admit(self) -> None:
        """Take note that it leaves the queue."""
        self._admitted = self._first = self._last = time.perf_counter()

    def say(self, sites: Mapping[str, SiteReading] | None) -> int:
        """Tell of the token that was chosen last, and of what sites did before it; returns its id."""
        choice = self.chooser.choices.popleft()
        self._last = time.perf_counter()
        if not self._growing.token_ids:
            self._first = self._last
        piece = self._growing.push(choice.token_id)
        self._tell(Token(token_id=choice.token_id, piece=piece, logprob=choice.logprob, top=choice.top, sites=sites))
        return choice.token_id

    def end(self, context_length: int) -> str | None:
        """Return why it ends here, see `Generation.finish_reason`, or None."""
        if reason := self._growing.finish_reason:
            return reason
        if self.chooser.ended:
            return "stop"
        full = len(self.request.prompt_ids) + len(self._growing.token_ids) > context_length  # the last is never held
        return "context" if full else None

    def finish(self, reason: str) -> None:
        """Tell of its end; ``reason`` is why, unless the text itself says."""
        try:
            piece = self._growing.finish()
        except EngramError as error:  # its last bytes can't be decoded
            return self.fail(error)
        generation = Generation(
            text=self._growing.text,
            token_ids=tuple(self._growing.token_ids),
            finish_reason=self._growing.finish_reason or reason,  # the rest may hold a stop string
            prompt_tokens=len(self.request.prompt_ids),
            prefilled_tokens=self.usage.prefilled_tokens,
            prefill_s=self.usage.prefill_s,
            ttft_s=self._first - self._admitted,
            decode_s=self._last - self._first,
            tables=self.usage.tables,
            drafts=self._drafts(),
            experts=self.usage.experts,
        )
        self._tell(Finished(piece=piece, generation=generation, queued_s=self._admitted - self.job.submitted))

    def fail(self, error: EngramError) -> None:
        """Tell that it can't be finished."""
        self._tell(Failed(error))

    def _drafts(self) -> DraftStatistics | None:
        drafts, plain = self.usage.drafts, self.usage.passes
        return drafts and drafts + DraftStatistics(drafter=drafts.drafter, forwards=plain, tokens=plain)

    def _tell(self, event: Event) -> None:
        if not self.job.cancelled:
            self.job.tell(self._index, event)
