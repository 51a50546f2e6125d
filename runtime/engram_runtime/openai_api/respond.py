"""From a body to the whole response."""

import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from engram_runtime.errors import EngramError
from engram_runtime.openai_api.errors import ApiError, as_api_error
from engram_runtime.openai_api.job import Engines, Job, prepare
from engram_runtime.openai_api.mailbox import Mailbox, Told
from engram_runtime.serving.engine_protocol import Ticket
from engram_runtime.serving.request import DEFAULT_TIME_LIMIT_S

WAITING_FOR_GRAMMARS = 4  # threads
_GRAMMAR_THREADS: RunVar[CapacityLimiter | None] = RunVar("engram grammar threads", None)


@asynccontextmanager
async def asked(job: Job, *, client: str) -> AsyncIterator[Mailbox]:
    """Submit a job and yield what is told of it; leaving, be it before the job is taken, cancels what isn't finished.

    Raises:
        ApiError: the queue is full, or the engine refuses.
    """
    mailbox = Mailbox()
    tickets: list[Ticket] = []
    left = threading.Event()

    def submit() -> None:
        tickets.append(job.engine.submit(job.requests, mailbox.tell, client=client))
        if left.is_set():
            tickets[0].cancel()

    try:
        await to_thread.run_sync(submit, limiter=_grammar_threads() if _has_grammar(job) else None)
        yield mailbox
    except EngramError as error:
        raise as_api_error(error) from error
    finally:
        left.set()
        for ticket in tickets:
            ticket.cancel()


def _has_grammar(job: Job) -> bool:
    return any(request.grammar is not None for request in job.requests)


def _grammar_threads() -> CapacityLimiter:
    """Return what bounds the threads that wait for grammars, which may take seconds; other requests have their own."""
    if (limiter := _GRAMMAR_THREADS.get()) is None:
        limiter = CapacityLimiter(WAITING_FOR_GRAMMARS)
        _GRAMMAR_THREADS.set(limiter)
    return limiter


async def respond(
    engines: Engines,
    path: str,
    body: Mapping[str, Any],
    *,
    client: str = "",
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> dict[str, Any]:
    """Answer a request as OpenAI would; cancelling this ends what the engine does for it.

    Args:
        engines: by the names that requests call them by.
        path: ``/v1/chat/completions`` or ``/v1/completions``.
        body: a JSON object.
        client: who asks; turns are taken between clients.
        time_limit_s: seconds after which its texts end as they are.

    Raises:
        ApiError: the body can't be served, the queue is full, or the engine failed at it.
    """
    job = await to_thread.run_sync(prepare, engines, path, body, time_limit_s)
    if job.stream:
        raise ApiError("stream is true, which only the server does; leave it out", param="stream", code="invalid_value")
    async with asked(job, client=client) as mailbox:
        await completed(job, mailbox)
    return job.answer.whole()


async def completed(job: Job, mailbox: Mailbox) -> None:
    """Wait until all texts of a job have ended; raises ApiError as soon as one failed."""
    async for batch in mailbox.batches():
        take(job, batch)
        if not job.answer.unfinished:
            return


def take(job: Job, batch: Sequence[Told]) -> list[dict[str, Any]]:
    """Let the answer take events; returns the chunks they make."""
    return [chunk for index, event in batch for chunk in job.answer.tell(index, event)]
